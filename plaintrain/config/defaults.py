"""Every config key once, with its default and what it means; `get_cfg()` hands out copies.

Names are Detectron2's wherever it has the concept.
"""

from plaintrain.config.config import CfgNode as CN

_C = CN()
# Version of the key names; 2 is Detectron2's current one.
_C.VERSION = 2
# Folder of everything a run writes; a fresh run moves an older one's files into old-1/, old-2/, ...
_C.OUTPUT_DIR = "./output"
_C.OUTPUT = CN()
# Where losses, times and results go: console, json (metrics.json), csv (metrics.csv), tensorboard.
_C.OUTPUT.WRITERS = ("console", "json", "tensorboard")
# Make OUTPUT_DIR/report.html at the end of training, if matplotlib is installed.
_C.OUTPUT.REPORT = True
# Seed of weights, sample order and augmentation; -1 draws one, logs it and keeps it on resume.
_C.SEED = -1
# Let cuDNN time its algorithms for every new input size: pays off when sizes repeat. A resumed run may then
# choose others, and round differently.
_C.CUDNN_BENCHMARK = False
# Seconds within which a rank of several must finish a step, or a batch in evaluation; else all ranks end,
# saying where each one stands. While rank 0 scores, and in a first step, 30 minutes more. 0: never.
_C.HANG_TIMEOUT = 600.0
# Iterations between two visits of the writers (console, metrics.json, TensorBoard).
_C.LOG_PERIOD = 20
# Precision of float32 matrix products and convolutions on a GPU: "" leaves PyTorch's default; highest
# (float32 throughout), high (TF32) or medium (bfloat16 for matrix products, TF32 for convolutions).
_C.FLOAT32_PRECISION = ""
# Order of training and validation epochs, repeated until SOLVER.MAX_EPOCHS training epochs are done:
# [["train", 2], ["val", 1]]. A val epoch computes the losses on DATASETS.TEST. For epoch_train_net.py.
_C.WORKFLOW = [["train", 1]]

# ---- model -----------------------------------------------------------------------------------
_C.MODEL = CN()
# GeneralizedRCNN (Faster, Mask and Keypoint R-CNN), ProposalNetwork (its RPN alone), RetinaNet, FCOS
# or SSD (with SSDlite).
_C.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
# auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps.
_C.MODEL.DEVICE = "auto"
# Where training or evaluation starts: "" (random), a file, http(s)://...,
# torchvision://resnet50/IMAGENET1K_V2, torchvision://fasterrcnn_resnet50_fpn/COCO_V1,
# detectron2://ImageNetPretrained/MSRA/R-50.pkl.
_C.MODEL.WEIGHTS = ""
# Per-channel mean and standard deviation of the input (0 to 255), in the order of INPUT.FORMAT.
_C.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
_C.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
# Heads of GeneralizedRCNN beside the boxes: Mask R-CNN, Keypoint R-CNN, or both.
_C.MODEL.MASK_ON = False
_C.MODEL.KEYPOINT_ON = False
# Keep images, activations and weights of convolutions in the memory format channels_last: made for bfloat16
# and float16 on a GPU; on a CPU it may be slower. Checkpoints fit both.
_C.MODEL.CHANNELS_LAST = False
# Compile backbone, FPN and heads (torch.compile): minutes at the start, then faster where elementwise work
# counts, mostly on a GPU. Where the compiler fails, a warning says so and training goes on without it.
# Averaged weights (MODEL.EMA) are evaluated as they are, not compiled.
_C.MODEL.COMPILE = False
# Not built: accepts only False.
_C.MODEL.LOAD_PROPOSALS = False

# Averaged weights: an exponential moving average of the parameters and the norms' statistics.
_C.MODEL.EMA = CN()
_C.MODEL.EMA.ENABLED = False
# Weight of the average so far at each step; it keeps about the last 1 / (1 - DECAY) steps.
_C.MODEL.EMA.DECAY = 0.999
# Begin with a shorter memory: step n has the weight min(DECAY, (1 + n) / (10 + n)).
_C.MODEL.EMA.WARMUP = True
# Which weights are evaluated (and kept as model_best.pth), and which become model_final.pth: averaged or
# raw. Numbered checkpoints hold both.
_C.MODEL.EMA.EVALUATE = "averaged"
_C.MODEL.EMA.FINAL = "averaged"

_C.MODEL.BACKBONE = CN()
# build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone (levels p3 to p7),
# build_mobilenet_v3_large_fpn_backbone, build_tiny_backbone; for SSD build_ssd_vgg16_backbone,
# build_ssdlite_mobilenet_v3_large_backbone, build_tiny_backbone.
_C.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
# First stages that are not trained: 0 none, 1 the stem, 2 stem and res2, ... 5 all.
_C.MODEL.BACKBONE.FREEZE_AT = 2

_C.MODEL.RESNETS = CN()
# 18, 34, 50, 101 or 152.
_C.MODEL.RESNETS.DEPTH = 50
# FrozenBN, BN, SyncBN or GN. From random weights FrozenBN does not learn.
_C.MODEL.RESNETS.NORM = "FrozenBN"
# Added to the variance in every norm of the backbone. torchvision evaluates the detectors of its first
# COCO weights (fasterrcnn, maskrcnn, keypointrcnn and retinanet_resnet50_fpn) with 0.
_C.MODEL.RESNETS.NORM_EPS = 1e-5
# More than one group makes a ResNeXt (depth 50 and more): 32x8d is NUM_GROUPS 32, WIDTH_PER_GROUP 8.
_C.MODEL.RESNETS.NUM_GROUPS = 1
_C.MODEL.RESNETS.WIDTH_PER_GROUP = 64
# Stride 2 in the 1x1 convolution of a bottleneck: True only for MSRA's original ResNets.
_C.MODEL.RESNETS.STRIDE_IN_1X1 = False
# Stages that feed the FPN; empty means the ones the backbone always uses.
_C.MODEL.RESNETS.OUT_FEATURES = []
_C.MODEL.RESNETS.RES5_DILATION = 1
_C.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
# Output channels of res2; 0 means what the depth implies (64 for 18 and 34, else 256).
_C.MODEL.RESNETS.RES2_OUT_CHANNELS = 0
_C.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, False]

_C.MODEL.TINY = CN()
# build_tiny_backbone: two 3x3 convolutions per entry, the first of stride 2.
_C.MODEL.TINY.CHANNELS = [32, 64, 128]
# Output levels: of the last so many entries.
_C.MODEL.TINY.NUM_LEVELS = 1
_C.MODEL.TINY.OUT_CHANNELS = 64
# BN, SyncBN or GN.
_C.MODEL.TINY.NORM = "GN"

_C.MODEL.FPN = CN()
_C.MODEL.FPN.OUT_CHANNELS = 256
# "" (none), BN, SyncBN or GN.
_C.MODEL.FPN.NORM = ""
# Stages the FPN reads; empty means the ones the backbone always uses.
_C.MODEL.FPN.IN_FEATURES = []
_C.MODEL.FPN.FUSE_TYPE = "sum"
# What P6 of build_retinanet_resnet_fpn_backbone is made from: p5 (torchvision) or res5 (Detectron2,
# torchvision's retinanet_resnet50_fpn_v2).
_C.MODEL.FPN.P6_IN_FEATURE = "p5"

_C.MODEL.ANCHOR_GENERATOR = CN()
# AnchorGenerator (torchvision's: rounded to whole pixels, strides from the sizes of the feature maps: 61
# rather than 64 where a batch is padded to 800 pixels) or DefaultAnchorGenerator (Detectron2's: not rounded,
# the backbone's own strides; and as there, RetinaNet cuts boxes at the image's edge after NMS, not before).
_C.MODEL.ANCHOR_GENERATOR.NAME = "AnchorGenerator"
# One list a feature level, in pixels of the network's input: the square root of an anchor's area.
# A single list serves every level.
_C.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
# Height / width; one list a level, or a single list for every level.
_C.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
# Of the first anchor's centre, in strides; DefaultAnchorGenerator only.
_C.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0

_C.MODEL.PROPOSAL_GENERATOR = CN()
_C.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"

_C.MODEL.RPN = CN()
_C.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
_C.MODEL.RPN.IN_FEATURES = []
_C.MODEL.RPN.BOUNDARY_THRESH = -1
# Anchors with IoU below the first are background, from the second on foreground.
_C.MODEL.RPN.IOU_THRESHOLDS = [0.3, 0.7]
_C.MODEL.RPN.IOU_LABELS = [0, -1, 1]
# Anchors sampled per image for the RPN's losses, and the largest share of foreground among them.
_C.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 256
_C.MODEL.RPN.POSITIVE_FRACTION = 0.5
# Proposals per level before NMS, and per image after it.
_C.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 2000
_C.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000
_C.MODEL.RPN.POST_NMS_TOPK_TRAIN = 1000
_C.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
_C.MODEL.RPN.NMS_THRESH = 0.7
# Proposals of lower objectness are dropped, in training too; torchvision's MobileNets have 0.05.
_C.MODEL.RPN.SCORE_THRESH = 0.0
# -1 keeps the feature's channels; one entry per 3x3 convolution.
_C.MODEL.RPN.CONV_DIMS = [-1]
# The loss of the boxes: smooth_l1 (SMOOTH_L1_BETA 0 or more; 0 is L1, as in Detectron2) or giou. LOSS_WEIGHT
# is a factor of both losses, BBOX_REG_LOSS_WEIGHT of that of the boxes.
_C.MODEL.RPN.BBOX_REG_LOSS_TYPE = "smooth_l1"
_C.MODEL.RPN.BBOX_REG_LOSS_WEIGHT = 1.0
_C.MODEL.RPN.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_C.MODEL.RPN.SMOOTH_L1_BETA = 1.0 / 9
_C.MODEL.RPN.LOSS_WEIGHT = 1.0
# What both losses are divided by: the anchors "sampled" in the batch (torchvision), or the "batch_size":
# BATCH_SIZE_PER_IMAGE times the images (Detectron2). They differ where there are fewer anchors.
_C.MODEL.RPN.LOSS_NORMALIZER = "sampled"

_C.MODEL.ROI_HEADS = CN()
_C.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
_C.MODEL.ROI_HEADS.IN_FEATURES = []
# Classes without the background; 0 asks the training dataset.
_C.MODEL.ROI_HEADS.NUM_CLASSES = 0
# Proposals with at least this IoU are foreground.
_C.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.5]
_C.MODEL.ROI_HEADS.IOU_LABELS = [0, 1]
# Proposals sampled per image for the head's losses, and the largest share of foreground among them.
_C.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512
_C.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.25
_C.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = True
# Detections below this score are dropped; NMS within a class at this IoU.
_C.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05
_C.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.5

_C.MODEL.ROI_BOX_HEAD = CN()
_C.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
# ROIAlign (torchvision's) or ROIAlignV2 (Detectron2's: aligned, without the half-pixel shift).
_C.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlign"
_C.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
# Samples per bin and side; 0 takes as many as the bin has pixels.
_C.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
# The head: NUM_CONV 3x3 convolutions of CONV_DIM channels with NORM ("", BN, SyncBN or GN), then
# NUM_FC layers of FC_DIM. 0 and 2 is the usual head, 4 and 1 with BN that of
# torchvision's fasterrcnn_resnet50_fpn_v2.
_C.MODEL.ROI_BOX_HEAD.NUM_FC = 2
_C.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
_C.MODEL.ROI_BOX_HEAD.NUM_CONV = 0
_C.MODEL.ROI_BOX_HEAD.CONV_DIM = 256
_C.MODEL.ROI_BOX_HEAD.NORM = ""
_C.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# See MODEL.RPN.
_C.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = "smooth_l1"
_C.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT = 1.0
_C.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0 / 9
_C.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False
_C.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = False

_C.MODEL.ROI_MASK_HEAD = CN()
_C.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
_C.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIAlign"
# Masks are predicted at twice this resolution.
_C.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
_C.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 2
_C.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
_C.MODEL.ROI_MASK_HEAD.CONV_DIM = 256
# "" (none), BN, SyncBN or GN.
_C.MODEL.ROI_MASK_HEAD.NORM = ""
_C.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = False
# Masks fill their boxes exactly, in training targets and where they are pasted, as in Detectron2. False is
# torchvision's convention, for its published weights: targets half a pixel off, masks pasted too large.
_C.MODEL.ROI_MASK_HEAD.ALIGNED = True

_C.MODEL.ROI_KEYPOINT_HEAD = CN()
_C.MODEL.ROI_KEYPOINT_HEAD.NAME = "KRCNNConvDeconvUpsampleHead"
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE = "ROIAlign"
# Heatmaps are predicted at four times this resolution.
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION = 14
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO = 2
_C.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [512, 512, 512, 512, 512, 512, 512, 512]
# 0 asks the training dataset.
_C.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 0
# Images with fewer labelled keypoints are left out of training.
_C.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 1
_C.MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS = True
_C.MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT = 1.0

_C.MODEL.RETINANET = CN()
# Classes; 0 asks the training dataset.
_C.MODEL.RETINANET.NUM_CLASSES = 0
_C.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
_C.MODEL.RETINANET.NUM_CONVS = 4
# Anchors with IoU below the first are background, from the second on foreground.
_C.MODEL.RETINANET.IOU_THRESHOLDS = [0.4, 0.5]
_C.MODEL.RETINANET.IOU_LABELS = [0, -1, 1]
# Score every anchor starts with, set through the classifier's bias (focal loss paper, 4.1).
_C.MODEL.RETINANET.PRIOR_PROB = 0.01
_C.MODEL.RETINANET.SCORE_THRESH_TEST = 0.05
# Candidates per level before NMS.
_C.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 1000
_C.MODEL.RETINANET.NMS_THRESH_TEST = 0.5
_C.MODEL.RETINANET.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
# smooth_l1, or giou as torchvision's retinanet_resnet50_fpn_v2.
_C.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = "smooth_l1"
# Where smooth_l1 turns from quadratic to linear, in the units of the regression; 0 is L1.
_C.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = 0.0
# Focal loss: the higher gamma, the less the easy anchors count; 0 is cross entropy. Alpha weighs the class
# that is there, 1 - alpha the others; -1 weighs none.
_C.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 2.0
_C.MODEL.RETINANET.FOCAL_LOSS_ALPHA = 0.25
# Norm of the head's towers: "" (none) or GN.
_C.MODEL.RETINANET.NORM = ""

_C.MODEL.FCOS = CN()
# Classes; 0 asks the training dataset.
_C.MODEL.FCOS.NUM_CLASSES = 0
_C.MODEL.FCOS.NUM_CONVS = 4
# Score every location starts with, set through the classifier's bias.
_C.MODEL.FCOS.PRIOR_PROB = 0.01
# A location belongs to a box if it is within this many strides of its centre.
_C.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
_C.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
# Candidates per level before NMS.
_C.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
_C.MODEL.FCOS.NMS_THRESH_TEST = 0.6

_C.MODEL.SSD = CN()
# Classes without the background; 0 asks the training dataset.
_C.MODEL.SSD.NUM_CLASSES = 0
# SSDHead (3x3 convolutions) or SSDLiteHead (depthwise separable ones).
_C.MODEL.SSD.HEAD_NAME = "SSDHead"
# One list a level; each ratio r stands for r and 1/r, and 1 is always there.
_C.MODEL.SSD.ASPECT_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
# Side of the boxes as a share of the image, one a level and one more; empty spreads them evenly from
# MIN_RATIO to MAX_RATIO.
_C.MODEL.SSD.SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
_C.MODEL.SSD.MIN_RATIO = 0.15
_C.MODEL.SSD.MAX_RATIO = 0.9
# Distance of box centres in pixels, one a level; empty takes it from the sizes of the feature maps.
_C.MODEL.SSD.STEPS = [8, 16, 32, 64, 100, 300]
# Boxes with at least this IoU are foreground, and the share of foreground after hard negative mining.
_C.MODEL.SSD.IOU_THRESHOLD = 0.5
_C.MODEL.SSD.POSITIVE_FRACTION = 0.25
_C.MODEL.SSD.SCORE_THRESH_TEST = 0.01
# Candidates per class before NMS.
_C.MODEL.SSD.TOPK_CANDIDATES_TEST = 400
_C.MODEL.SSD.NMS_THRESH_TEST = 0.45

# ---- input -----------------------------------------------------------------------------------
_C.INPUT = CN()
# Shortest side in training, pixels: one of these (choice), or any between the two (range); 0: as is.
_C.INPUT.MIN_SIZE_TRAIN = (800,)
_C.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
# Longest side in training, pixels.
_C.INPUT.MAX_SIZE_TRAIN = 1333
# Shortest and longest side in evaluation, pixels; MIN_SIZE_TEST 0 keeps the image as it is.
_C.INPUT.MIN_SIZE_TEST = 800
_C.INPUT.MAX_SIZE_TEST = 1333
# (height, width): resize to exactly this, in training and evaluation, instead of the above; SSD needs
# it. (0, 0) is off.
_C.INPUT.FIXED_SIZE = (0, 0)
# Augmentations that come before CROP, the resize and RANDOM_FLIP, in order; each a name, or a name with
# arguments: [RandomPhotometricDistort, {RandomZoomOut: {p: 0.3}}, RandomIoUCrop]. README lists them.
_C.INPUT.AUGMENTATIONS = []
# horizontal, vertical or none; half of the images are flipped.
_C.INPUT.RANDOM_FLIP = "horizontal"
_C.INPUT.CROP = CN()
_C.INPUT.CROP.ENABLED = False
# relative: SIZE (h, w) is a share of the image. relative_range: a share between SIZE and 1.
# absolute: pixels. absolute_range: pixels between SIZE[0] and SIZE[1] for each side.
_C.INPUT.CROP.TYPE = "relative_range"
_C.INPUT.CROP.SIZE = [0.9, 0.9]
# Channel order the model is fed: RGB (torchvision's weights) or BGR (Caffe's, MSRA's).
_C.INPUT.FORMAT = "RGB"
# (low, high): the pixel values that become 0 and 255, in every image that is read: [0, 4095] for 12 bits in
# 16-bit files, [-1024, 3071] for CT. []: by each image's type, 8 bits 0 to 255, 16 bits without sign 0 to
# 65535, floats 0 to 1. An image with other values is an error.
_C.INPUT.PIXEL_RANGE = []

# ---- datasets --------------------------------------------------------------------------------
_C.DATASETS = CN()
# Names of registered or declared datasets; several are joined.
_C.DATASETS.TRAIN = ()
_C.DATASETS.TEST = ()
# WeightedTrainingSampler: [[name, factor], ...]; datasets that are not named have factor 1.
_C.DATASETS.TRAIN_REPEAT_FACTOR = []
# Datasets declared here: name -> {FORMAT: coco | coco_results | voc | yolo | shapes | images |
# concat, ...}; see README.
_C.DATASETS.DECLARE = CN(new_allowed=True)

_C.DATALOADER = CN()
# Workers per rank; 0 loads in the training process, between the steps.
_C.DATALOADER.NUM_WORKERS = 4
# What they are: process; thread, which need not send images from one process to another; auto: threads for
# mappers that say that they are thread_safe, as the built-in ones do. The samples are the same.
_C.DATALOADER.WORKER_TYPE = "auto"
# Bytes of decoded training images that each rank keeps in memory, so that they are not read again; not in
# worker processes, which would not share them. 0: none.
_C.DATALOADER.CACHE_BYTES = 0
# Where a training image cannot be read, train on another one, drawn from SEED and its place, and log it; else
# it ends the run. Evaluation never leaves an image out.
_C.DATALOADER.SKIP_UNREADABLE = False
# Images of like shape in one batch, to pad less.
_C.DATALOADER.ASPECT_RATIO_GROUPING = True
# Batches that are cut from one window of images sorted by aspect ratio, and shuffled after; 0 makes two
# groups instead, upright and wide.
_C.DATALOADER.GROUP_WINDOW = 100
# TrainingSampler: every image once a pass. RepeatFactorTrainingSampler: images of rare classes more
# often (LVIS). ClassBalancedTrainingSampler: every class as often. WeightedTrainingSampler: by
# DATASETS.TRAIN_REPEAT_FACTOR. RandomSubsetTrainingSampler: a fixed random share of the images.
_C.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
# RepeatFactorTrainingSampler: classes in a smaller share of the images than this are repeated, by the
# square root of the quotient (REPEAT_SQRT) or the quotient itself.
_C.DATALOADER.REPEAT_THRESHOLD = 0.0
_C.DATALOADER.REPEAT_SQRT = True
# RandomSubsetTrainingSampler: the share of the images to use, in (0, 1].
_C.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
# Leave out training images that have no annotation but crowds.
_C.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True

# ---- solver ----------------------------------------------------------------------------------
_C.SOLVER = CN()
# SGD or AdamW.
_C.SOLVER.OPTIMIZER = "SGD"
# Images per iteration, over all ranks.
_C.SOLVER.IMS_PER_BATCH = 16
_C.SOLVER.MAX_ITER = 40000
# Above 0, MAX_ITER becomes as many passes over the training images: ceil(images / batch) iterations each.
_C.SOLVER.MAX_EPOCHS = 0
# Count STEPS, MOMENTUM_SCHEDULE, CHECKPOINT_PERIOD, TEST.EVAL_PERIOD, TEST.EVAL_START and
# TEST.VAL_LOSS_PERIOD in epochs; needs MAX_EPOCHS. WARMUP_ITERS stays in iterations.
_C.SOLVER.BY_EPOCH = False
# Seconds, from the start of the process' training, after which a run stops with a checkpoint: after the
# step, or the evaluation, in which they are over. --resume goes on. 0: no limit.
_C.SOLVER.MAX_TIME = 0.0
# Micro-batches that a rank's batch is split into, computed one after the other: less memory.
_C.SOLVER.ACCUMULATE_STEPS = 1
# The run ends after this many evaluations in a row without a new best TEST.BEST_METRIC; 0: never.
_C.SOLVER.PATIENCE = 0
_C.SOLVER.BASE_LR = 0.001
# SGD's momentum, AdamW's beta1.
_C.SOLVER.MOMENTUM = 0.9
# Momentum that changes: points [iteration, momentum], as [[0, 0.95], [400, 0.85], [1000, 0.95]]; before
# the first and after the last it stays. Empty: MOMENTUM throughout.
_C.SOLVER.MOMENTUM_SCHEDULE = []
# Between two points: linear, cosine, or step (the earlier point's value until the next).
_C.SOLVER.MOMENTUM_INTERPOLATION = "linear"
_C.SOLVER.NESTEROV = False
_C.SOLVER.WEIGHT_DECAY = 0.0001
# Weight decay of normalisation layers, and of all biases (null: as the rest of their layer).
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0
_C.SOLVER.WEIGHT_DECAY_BIAS = None
# Learning rate of biases, and of the backbone, as multiples of BASE_LR.
_C.SOLVER.BIAS_LR_FACTOR = 1.0
_C.SOLVER.BACKBONE_MULTIPLIER = 1.0
# WarmupMultiStepLR, WarmupCosineLR or WarmupStepWithFixedGammaLR.
_C.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
# WarmupMultiStepLR multiplies by GAMMA at each of STEPS.
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.STEPS = (30000,)
# WarmupStepWithFixedGammaLR multiplies by GAMMA this many times, at even distances.
_C.SOLVER.NUM_DECAYS = 3
# WarmupCosineLR ends at this learning rate.
_C.SOLVER.BASE_LR_END = 0.0
# Warm-up: WARMUP_ITERS iterations from BASE_LR * WARMUP_FACTOR; linear or constant.
_C.SOLVER.WARMUP_FACTOR = 0.001
_C.SOLVER.WARMUP_ITERS = 1000
_C.SOLVER.WARMUP_METHOD = "linear"
# Squeeze the whole schedule into what is left after the warm-up, instead of cutting off its start.
_C.SOLVER.RESCALE_INTERVAL = False
_C.SOLVER.CLIP_GRADIENTS = CN()
_C.SOLVER.CLIP_GRADIENTS.ENABLED = False
# value: each element; norm: each parameter's norm; full_model: the norm over all parameters.
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
_C.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
# Iterations between two checkpoints, and how many numbered ones are kept (0: all). One more is saved before
# each evaluation that falls between them, and deleted when the next one is written.
_C.SOLVER.CHECKPOINT_PERIOD = 5000
_C.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0
# Write checkpoints in a thread: the loop waits only for a copy, for which the host's memory must have room.
_C.SOLVER.ASYNC_CHECKPOINT = False
# When a loss or the gradient norm is NaN or infinite: stop at the next save or log; or skip that step on all
# ranks, which costs a device sync in each step.
_C.SOLVER.ON_NONFINITE = "stop"
# skip: steps in a row that may be skipped.
_C.SOLVER.MAX_SKIPPED_STEPS = 10
# Automatic mixed precision: float16 (with a gradient scaler) or bfloat16.
_C.SOLVER.AMP = CN()
_C.SOLVER.AMP.ENABLED = False
_C.SOLVER.AMP.PRECISION = "float16"
# The number of processes that the config is written for (Detectron2's rule): with k times as many, the
# batch and the learning rate are multiplied by k, and the counts of iterations divided by it. 0: off.
_C.SOLVER.REFERENCE_WORLD_SIZE = 0
# The batch that the config is written for (linear rule): with IMS_PER_BATCH k times as large, the learning
# rate is multiplied by k, and the counts of iterations divided by it. 0: off.
_C.SOLVER.REFERENCE_IMS_PER_BATCH = 0

_C.DEBUG = CN()
# Save the samples of a batch whose loss or gradient is not finite, as OUTPUT_DIR/bad_batch_N.pth.
_C.DEBUG.DUMP_BAD_BATCH = False

# ---- test ------------------------------------------------------------------------------------
_C.TEST = CN()
# Iterations between two evaluations; 0 evaluates only at the end. epoch_train_net.py evaluates at the end of
# the epoch in which one falls due.
_C.TEST.EVAL_PERIOD = 0
# Iteration after which the first of them takes place; 0: after EVAL_PERIOD.
_C.TEST.EVAL_START = 0
# Iterations between two computations of the losses on DATASETS.TEST; 0: never.
_C.TEST.VAL_LOSS_PERIOD = 0
# The result that says which model is the best, kept as model_best.pth: "" (none), auto (the first), or
# its name, such as bbox/AP or, of one of several datasets, coco_2017_val/bbox/AP; or val/total_loss. Higher
# is better, except for a loss.
_C.TEST.BEST_METRIC = ""
# Evaluate in the precision of SOLVER.AMP.PRECISION.
_C.TEST.AMP = False
# [[task, metric, value, tolerance], ...]: the run fails when the last evaluation is further off.
_C.TEST.EXPECTED_RESULTS = []
_C.TEST.DETECTIONS_PER_IMAGE = 100
# Standard deviations of the keypoints in COCO's OKS, one a keypoint; empty means COCO's for 17 of them.
_C.TEST.KEYPOINT_OKS_SIGMAS = []
# Images per rank and step in evaluation, at most. Those of a batch have one shape once they are resized and
# padded, so that what is found in an image does not depend on the others.
_C.TEST.IMS_PER_BATCH = 1
# Test-time augmentation, in every evaluation: each image at several sizes and mirrored, results merged.
_C.TEST.AUG = CN()
_C.TEST.AUG.ENABLED = False
# Shortest sides, pixels; the longest side stays within MAX_SIZE. With INPUT.FIXED_SIZE, its shape at these
# shortest sides.
_C.TEST.AUG.MIN_SIZES = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
_C.TEST.AUG.MAX_SIZE = 4000
# Each size mirrored (left and right) too.
_C.TEST.AUG.FLIP = True
# Not built: accepts only False.
_C.TEST.PRECISE_BN = CN()
_C.TEST.PRECISE_BN.ENABLED = False


def get_cfg():
    """Return a fresh config holding every key's default."""
    return _C.clone()


def split_overrides(words):
    """Return (names, overrides) of a command line of names and then KEY VALUE pairs.

    The pairs begin at the first word that is a key, or would be one in a section that there is.
    """
    for i, word in enumerate(words):
        section, dot, _ = word.partition(".")
        if section in _C and isinstance(_C[section], CN) == bool(dot):
            return words[:i], words[i:]
    return words, []
