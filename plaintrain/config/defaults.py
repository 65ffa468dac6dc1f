"""Default values of all config keys; key names are Detectron2's where it has the concept."""

from plaintrain.config.config import CfgNode as CN

_C = CN()
# Version of the config keys, as in Detectron2.
_C.VERSION = 2
# Output folder of the run; a new run moves the files of an earlier one to old-1/, old-2/, ...
_C.OUTPUT_DIR = "./output"
_C.OUTPUT = CN()
# Writers of losses, times and metrics: console, json (metrics.json), csv (metrics.csv), tensorboard.
_C.OUTPUT.WRITERS = ("console", "json", "tensorboard")
# Write OUTPUT_DIR/report.html at the end of training; needs matplotlib.
_C.OUTPUT.REPORT = True
# Seed of initial weights, sample order and augmentation; -1 draws one and reuses it on resume.
_C.SEED = -1
# torch.backends.cudnn.benchmark: faster if input sizes repeat; a resumed run may differ in rounding.
_C.CUDNN_BENCHMARK = False
# Seconds for a training step or evaluation batch of a multi-process run, after which all ranks print their
# position and exit; 30 minutes more for the first step and for rank 0's scoring. 0: no limit.
_C.HANG_TIMEOUT = 600.0
# Iterations between log writes.
_C.LOG_PERIOD = 20
# float32 matmuls and convolutions on a GPU: "" (PyTorch's default), highest, high (TF32), medium (bfloat16).
_C.FLOAT32_PRECISION = ""
# epoch_train_net.py: order of training and validation epochs, repeated until SOLVER.MAX_EPOCHS training
# epochs: [["train", 2], ["val", 1]]. A val epoch computes the losses on DATASETS.TEST.
_C.WORKFLOW = [["train", 1]]

# ---- model -----------------------------------------------------------------------------------
_C.MODEL = CN()
# GeneralizedRCNN (Faster, Mask and Keypoint R-CNN), ProposalNetwork (RPN only), RetinaNet, FCOS or SSD.
_C.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
# auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps.
_C.MODEL.DEVICE = "auto"
# Initial weights: "" (random), a file, http(s)://..., torchvision://resnet50/IMAGENET1K_V2,
# torchvision://fasterrcnn_resnet50_fpn/COCO_V1 or detectron2://ImageNetPretrained/MSRA/R-50.pkl.
_C.MODEL.WEIGHTS = ""
# Per-channel mean and standard deviation of pixels in 0..255, in the order of INPUT.FORMAT.
_C.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
_C.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
# Additional heads of GeneralizedRCNN: Mask R-CNN, Keypoint R-CNN.
_C.MODEL.MASK_ON = False
_C.MODEL.KEYPOINT_ON = False
# Memory format channels_last: faster with bfloat16 or float16 on a GPU.
_C.MODEL.CHANNELS_LAST = False
# torch.compile backbone, FPN and heads; eager mode if that fails, and for the evaluation of averaged weights.
_C.MODEL.COMPILE = False
# Not supported; must be False.
_C.MODEL.LOAD_PROPOSALS = False

# Exponential moving average of the parameters and the norms' running statistics.
_C.MODEL.EMA = CN()
_C.MODEL.EMA.ENABLED = False
# average = DECAY * average + (1 - DECAY) * weights, in each iteration.
_C.MODEL.EMA.DECAY = 0.999
# Decay of step n: min(DECAY, (1 + n) / (10 + n)).
_C.MODEL.EMA.WARMUP = True
# averaged or raw: the weights that are evaluated (and saved as model_best.pth), and those of
# model_final.pth. Numbered checkpoints contain both.
_C.MODEL.EMA.EVALUATE = "averaged"
_C.MODEL.EMA.FINAL = "averaged"

_C.MODEL.BACKBONE = CN()
# build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone (levels p3 to p7),
# build_mobilenet_v3_large_fpn_backbone, build_tiny_backbone; for SSD build_ssd_vgg16_backbone,
# build_ssdlite_mobilenet_v3_large_backbone, build_tiny_backbone.
_C.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
# Freeze the first stages: 0 none, 1 the stem, 2 stem and res2, ... 5 all.
_C.MODEL.BACKBONE.FREEZE_AT = 2

_C.MODEL.RESNETS = CN()
_C.MODEL.RESNETS.DEPTH = 50
# FrozenBN, BN, SyncBN or GN. FrozenBN needs pretrained weights.
_C.MODEL.RESNETS.NORM = "FrozenBN"
# eps of the backbone's norms; 0 for torchvision's COCO_V1 weights of R-CNNs and RetinaNet (not v2).
_C.MODEL.RESNETS.NORM_EPS = 1e-5
# ResNeXt, depth >= 50: 32x8d is NUM_GROUPS 32, WIDTH_PER_GROUP 8.
_C.MODEL.RESNETS.NUM_GROUPS = 1
_C.MODEL.RESNETS.WIDTH_PER_GROUP = 64
# Stride 2 in the 1x1 convolution of a bottleneck; True only for MSRA's original ResNets.
_C.MODEL.RESNETS.STRIDE_IN_1X1 = False
# Input stages of the FPN; [] is the backbone's default.
_C.MODEL.RESNETS.OUT_FEATURES = []
_C.MODEL.RESNETS.RES5_DILATION = 1
_C.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
# 0: 64 for depth 18 and 34, else 256.
_C.MODEL.RESNETS.RES2_OUT_CHANNELS = 0
_C.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, False]

_C.MODEL.TINY = CN()
# build_tiny_backbone: a stage per entry, two 3x3 convolutions, the first with stride 2.
_C.MODEL.TINY.CHANNELS = [32, 64, 128]
# Number of stages, the last ones, that are output levels.
_C.MODEL.TINY.NUM_LEVELS = 1
_C.MODEL.TINY.OUT_CHANNELS = 64
# BN, SyncBN or GN.
_C.MODEL.TINY.NORM = "GN"

_C.MODEL.FPN = CN()
_C.MODEL.FPN.OUT_CHANNELS = 256
# "" (none), BN, SyncBN or GN.
_C.MODEL.FPN.NORM = ""
# Input stages of the FPN; [] is the backbone's default.
_C.MODEL.FPN.IN_FEATURES = []
_C.MODEL.FPN.FUSE_TYPE = "sum"
# Input of P6 in build_retinanet_resnet_fpn_backbone: p5 (torchvision) or res5 (Detectron2, torchvision's v2).
_C.MODEL.FPN.P6_IN_FEATURE = "p5"

_C.MODEL.ANCHOR_GENERATOR = CN()
# AnchorGenerator (torchvision: rounded to pixels, strides computed from the sizes of image and feature map)
# or DefaultAnchorGenerator (Detectron2: not rounded, strides of the backbone; RetinaNet clips boxes to the
# image after NMS).
_C.MODEL.ANCHOR_GENERATOR.NAME = "AnchorGenerator"
# Square root of the area, in pixels of the network input; one list per level, or one for all levels.
_C.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
# height / width; one list per level, or one for all levels.
_C.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
# DefaultAnchorGenerator: offset of the first anchor's center, in strides.
_C.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0

_C.MODEL.PROPOSAL_GENERATOR = CN()
_C.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"

_C.MODEL.RPN = CN()
_C.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
_C.MODEL.RPN.IN_FEATURES = []
_C.MODEL.RPN.BOUNDARY_THRESH = -1
# Anchors are background below the first IoU, foreground from the second, else ignored.
_C.MODEL.RPN.IOU_THRESHOLDS = [0.3, 0.7]
_C.MODEL.RPN.IOU_LABELS = [0, -1, 1]
# Anchors sampled per image for the losses, and the maximum fraction of foreground.
_C.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 256
_C.MODEL.RPN.POSITIVE_FRACTION = 0.5
# Proposals per level before NMS, and per image after it.
_C.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 2000
_C.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000
_C.MODEL.RPN.POST_NMS_TOPK_TRAIN = 1000
_C.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
_C.MODEL.RPN.NMS_THRESH = 0.7
# Minimum objectness of proposals, in training too; 0.05 for torchvision's MobileNets.
_C.MODEL.RPN.SCORE_THRESH = 0.0
# Channels of the 3x3 convolutions; -1 is the number of input channels.
_C.MODEL.RPN.CONV_DIMS = [-1]
# Box loss: smooth_l1 (SMOOTH_L1_BETA 0 is L1, as in Detectron2) or giou. LOSS_WEIGHT multiplies both losses,
# BBOX_REG_LOSS_WEIGHT only the box loss.
_C.MODEL.RPN.BBOX_REG_LOSS_TYPE = "smooth_l1"
_C.MODEL.RPN.BBOX_REG_LOSS_WEIGHT = 1.0
_C.MODEL.RPN.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_C.MODEL.RPN.SMOOTH_L1_BETA = 1.0 / 9
_C.MODEL.RPN.LOSS_WEIGHT = 1.0
# Divide losses by the sampled anchors (sampled) or by BATCH_SIZE_PER_IMAGE * images (batch_size, Detectron2).
_C.MODEL.RPN.LOSS_NORMALIZER = "sampled"

_C.MODEL.ROI_HEADS = CN()
_C.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
_C.MODEL.ROI_HEADS.IN_FEATURES = []
# Without background; 0 takes the dataset's number.
_C.MODEL.ROI_HEADS.NUM_CLASSES = 0
# Proposals with at least this IoU are foreground.
_C.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.5]
_C.MODEL.ROI_HEADS.IOU_LABELS = [0, 1]
# Proposals sampled per image for the losses, and the maximum fraction of foreground.
_C.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512
_C.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.25
_C.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = True
# Minimum score of detections, and IoU of the NMS per class.
_C.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05
_C.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.5

_C.MODEL.ROI_BOX_HEAD = CN()
_C.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
# ROIAlign (torchvision) or ROIAlignV2 (Detectron2: aligned=True).
_C.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlign"
_C.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
# Sampling points per side of a bin; 0 is adaptive.
_C.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
# NUM_CONV 3x3 convolutions of CONV_DIM channels with NORM ("", BN, SyncBN or GN), then NUM_FC layers of
# FC_DIM; torchvision's fasterrcnn_resnet50_fpn_v2 has 4 with BN, then 1.
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
# Masks have twice this resolution.
_C.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
_C.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 2
_C.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
_C.MODEL.ROI_MASK_HEAD.CONV_DIM = 256
# "" (none), BN, SyncBN or GN.
_C.MODEL.ROI_MASK_HEAD.NORM = ""
_C.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = False
# Mask targets and pasted masks are aligned with their boxes, as in Detectron2. False for torchvision's
# weights: targets are shifted by half a pixel, masks are pasted slightly too large.
_C.MODEL.ROI_MASK_HEAD.ALIGNED = True

_C.MODEL.ROI_KEYPOINT_HEAD = CN()
_C.MODEL.ROI_KEYPOINT_HEAD.NAME = "KRCNNConvDeconvUpsampleHead"
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE = "ROIAlign"
# Heatmaps have four times this resolution.
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION = 14
_C.MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO = 2
_C.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [512, 512, 512, 512, 512, 512, 512, 512]
# 0 takes the dataset's number.
_C.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 0
# Images with fewer labelled keypoints are skipped in training.
_C.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 1
_C.MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS = True
_C.MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT = 1.0
# Score of a keypoint: logit of the heatmap's maximum (torchvision) or its probability (Detectron2).
_C.MODEL.ROI_KEYPOINT_HEAD.SCORE_TYPE = "logit"

_C.MODEL.RETINANET = CN()
# 0 takes the dataset's number.
_C.MODEL.RETINANET.NUM_CLASSES = 0
_C.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
_C.MODEL.RETINANET.NUM_CONVS = 4
# Anchors are background below the first IoU, foreground from the second, else ignored.
_C.MODEL.RETINANET.IOU_THRESHOLDS = [0.4, 0.5]
_C.MODEL.RETINANET.IOU_LABELS = [0, -1, 1]
# Initial score of all anchors (bias of the classifier; focal loss paper, section 4.1).
_C.MODEL.RETINANET.PRIOR_PROB = 0.01
_C.MODEL.RETINANET.SCORE_THRESH_TEST = 0.05
# Detections per level before NMS.
_C.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 1000
_C.MODEL.RETINANET.NMS_THRESH_TEST = 0.5
_C.MODEL.RETINANET.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
# smooth_l1 or giou (torchvision's retinanet_resnet50_fpn_v2).
_C.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = "smooth_l1"
# 0 is L1.
_C.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA = 0.0
# gamma and alpha of torchvision.ops.sigmoid_focal_loss; alpha -1 disables the weighting.
_C.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 2.0
_C.MODEL.RETINANET.FOCAL_LOSS_ALPHA = 0.25
# Losses are divided by the foreground anchors: image (of each image, torchvision) or ema (moving average of
# those of a batch, starting at 100, Detectron2).
_C.MODEL.RETINANET.LOSS_NORMALIZER = "image"
# Norm of the head: "" (none) or GN.
_C.MODEL.RETINANET.NORM = ""

_C.MODEL.FCOS = CN()
# 0 takes the dataset's number.
_C.MODEL.FCOS.NUM_CLASSES = 0
_C.MODEL.FCOS.NUM_CONVS = 4
# Initial score of all locations (bias of the classifier).
_C.MODEL.FCOS.PRIOR_PROB = 0.01
# Radius of center sampling, in strides.
_C.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
_C.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
# Detections per level before NMS.
_C.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
_C.MODEL.FCOS.NMS_THRESH_TEST = 0.6

_C.MODEL.SSD = CN()
# Without background; 0 takes the dataset's number.
_C.MODEL.SSD.NUM_CLASSES = 0
# SSDHead (3x3 convolutions) or SSDLiteHead (depthwise separable convolutions).
_C.MODEL.SSD.HEAD_NAME = "SSDHead"
# Default boxes as in torchvision: one list per level; r stands for r and 1/r, and 1 is always included.
_C.MODEL.SSD.ASPECT_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
# Sides as fractions of the image, one per level plus one; [] spaces them evenly from MIN_RATIO to MAX_RATIO.
_C.MODEL.SSD.SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
_C.MODEL.SSD.MIN_RATIO = 0.15
_C.MODEL.SSD.MAX_RATIO = 0.9
# Stride of each level in pixels; [] computes them from the sizes of the feature maps.
_C.MODEL.SSD.STEPS = [8, 16, 32, 64, 100, 300]
# Minimum IoU of foreground boxes, and the fraction of foreground after hard negative mining.
_C.MODEL.SSD.IOU_THRESHOLD = 0.5
_C.MODEL.SSD.POSITIVE_FRACTION = 0.25
_C.MODEL.SSD.SCORE_THRESH_TEST = 0.01
# Detections per class before NMS.
_C.MODEL.SSD.TOPK_CANDIDATES_TEST = 400
_C.MODEL.SSD.NMS_THRESH_TEST = 0.45

# ---- input -----------------------------------------------------------------------------------
_C.INPUT = CN()
# Shortest side in training, pixels: one of these (choice), or between the two (range); 0: no resize.
_C.INPUT.MIN_SIZE_TRAIN = (800,)
_C.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
# Maximum of the longest side in training.
_C.INPUT.MAX_SIZE_TRAIN = 1333
# The same in evaluation; MIN_SIZE_TEST 0: no resize.
_C.INPUT.MIN_SIZE_TEST = 800
_C.INPUT.MAX_SIZE_TEST = 1333
# (height, width): resize to this size instead, in training and evaluation; SSD needs it. (0, 0): off.
_C.INPUT.FIXED_SIZE = (0, 0)
# Augmentations before CROP, resize and RANDOM_FLIP, in order; names, or names with arguments:
# [RandomPhotometricDistort, {RandomZoomOut: {p: 0.3}}, RandomIoUCrop].
_C.INPUT.AUGMENTATIONS = []
# horizontal, vertical or none; with probability 0.5.
_C.INPUT.RANDOM_FLIP = "horizontal"
_C.INPUT.CROP = CN()
_C.INPUT.CROP.ENABLED = False
# relative: SIZE (h, w) is a fraction of the image. relative_range: a fraction between SIZE and 1.
# absolute: pixels. absolute_range: pixels between SIZE[0] and SIZE[1] for each side.
_C.INPUT.CROP.TYPE = "relative_range"
_C.INPUT.CROP.SIZE = [0.9, 0.9]
# Channel order of the model's input: RGB (torchvision's weights) or BGR (Caffe's, MSRA's).
_C.INPUT.FORMAT = "RGB"
# Pixel values (low, high) that are mapped to 0 and 255: [0, 4095] for 12 bits, [-1024, 3071] for CT; values
# outside raise an error. []: 0 to 255 for uint8, 0 to 65535 for uint16, 0 to 1 for floats.
_C.INPUT.PIXEL_RANGE = []

# ---- datasets --------------------------------------------------------------------------------
_C.DATASETS = CN()
# Names of registered or declared datasets; training concatenates them.
_C.DATASETS.TRAIN = ()
_C.DATASETS.TEST = ()
# WeightedTrainingSampler: [[name, factor], ...]; other datasets have factor 1.
_C.DATASETS.TRAIN_REPEAT_FACTOR = []
# Datasets to register, by name: {FORMAT: coco | coco_results | voc | yolo | shapes | images | concat, ...}.
_C.DATASETS.DECLARE = CN(new_allowed=True)

_C.DATALOADER = CN()
# Workers per rank; 0 loads in the main thread.
_C.DATALOADER.NUM_WORKERS = 4
# process, thread, or auto (threads if the mapper is thread_safe); the samples are the same.
_C.DATALOADER.WORKER_TYPE = "auto"
# Size of each rank's cache of decoded training images, in bytes; with thread workers or NUM_WORKERS 0.
_C.DATALOADER.CACHE_BYTES = 0
# Replace unreadable training images by others, drawn from SEED, and log them; False: raise.
_C.DATALOADER.SKIP_UNREADABLE = False
# Batch images of similar aspect ratio, to pad less.
_C.DATALOADER.ASPECT_RATIO_GROUPING = True
# Batches per window of images that is sorted by aspect ratio; 0: portrait and landscape, as in Detectron2.
_C.DATALOADER.GROUP_WINDOW = 100
# TrainingSampler: each image once per epoch. RepeatFactorTrainingSampler: oversamples images of rare classes
# (LVIS). ClassBalancedTrainingSampler: all classes equally often. WeightedTrainingSampler: by
# DATASETS.TRAIN_REPEAT_FACTOR. RandomSubsetTrainingSampler: a fixed random subset.
_C.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
# RepeatFactorTrainingSampler: a class in a fraction f of the images has the repeat factor
# max(1, REPEAT_THRESHOLD / f), or with REPEAT_SQRT its square root.
_C.DATALOADER.REPEAT_THRESHOLD = 0.0
_C.DATALOADER.REPEAT_SQRT = True
# RandomSubsetTrainingSampler: fraction of the images, in (0, 1].
_C.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
# Skip training images without annotations, or with crowds only.
_C.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True

# ---- solver ----------------------------------------------------------------------------------
_C.SOLVER = CN()
# SGD or AdamW.
_C.SOLVER.OPTIMIZER = "SGD"
# Total batch size of all ranks.
_C.SOLVER.IMS_PER_BATCH = 16
_C.SOLVER.MAX_ITER = 40000
# If above 0, sets MAX_ITER; an epoch has ceil(images / batch size) iterations.
_C.SOLVER.MAX_EPOCHS = 0
# Count STEPS, MOMENTUM_SCHEDULE, CHECKPOINT_PERIOD, TEST.EVAL_PERIOD, TEST.EVAL_START and
# TEST.VAL_LOSS_PERIOD in epochs; needs MAX_EPOCHS. WARMUP_ITERS stays in iterations.
_C.SOLVER.BY_EPOCH = False
# Time limit in seconds, after which the run saves a checkpoint and stops; 0: no limit.
_C.SOLVER.MAX_TIME = 0.0
# Gradient accumulation: number of micro-batches per batch.
_C.SOLVER.ACCUMULATE_STEPS = 1
# Early stopping: evaluations without improvement of TEST.BEST_METRIC; 0: off.
_C.SOLVER.PATIENCE = 0
_C.SOLVER.BASE_LR = 0.001
# Momentum of SGD, beta1 of AdamW.
_C.SOLVER.MOMENTUM = 0.9
# Points [iteration, momentum]: [[0, 0.95], [400, 0.85], [1000, 0.95]]; []: MOMENTUM.
_C.SOLVER.MOMENTUM_SCHEDULE = []
# linear, cosine or step (constant until the next point).
_C.SOLVER.MOMENTUM_INTERPOLATION = "linear"
_C.SOLVER.NESTEROV = False
_C.SOLVER.WEIGHT_DECAY = 0.0001
# Weight decay of norm layers and of biases (null: as the weights of their layer).
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0
_C.SOLVER.WEIGHT_DECAY_BIAS = None
# Learning rate factors of biases and of the backbone.
_C.SOLVER.BIAS_LR_FACTOR = 1.0
_C.SOLVER.BACKBONE_MULTIPLIER = 1.0
# WarmupMultiStepLR, WarmupCosineLR or WarmupStepWithFixedGammaLR.
_C.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
# WarmupMultiStepLR multiplies by GAMMA at each of STEPS.
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.STEPS = (30000,)
# WarmupStepWithFixedGammaLR multiplies by GAMMA this many times, at equal intervals.
_C.SOLVER.NUM_DECAYS = 3
# Final learning rate of WarmupCosineLR.
_C.SOLVER.BASE_LR_END = 0.0
# Warm-up of WARMUP_ITERS iterations from BASE_LR * WARMUP_FACTOR; linear or constant.
_C.SOLVER.WARMUP_FACTOR = 0.001
_C.SOLVER.WARMUP_ITERS = 1000
_C.SOLVER.WARMUP_METHOD = "linear"
# Rescale the schedule to the iterations after the warm-up, instead of overriding its start.
_C.SOLVER.RESCALE_INTERVAL = False
_C.SOLVER.CLIP_GRADIENTS = CN()
_C.SOLVER.CLIP_GRADIENTS.ENABLED = False
# value: each element; norm: norm of each parameter; full_model: total norm of all parameters.
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
_C.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
# Iterations between checkpoints, and the number of checkpoints to keep (0: all). Each evaluation in between
# is preceded by a temporary checkpoint, which the next checkpoint replaces.
_C.SOLVER.CHECKPOINT_PERIOD = 5000
_C.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0
# Write checkpoints in a background thread; needs host memory for a copy.
_C.SOLVER.ASYNC_CHECKPOINT = False
# On NaN or infinite loss or gradient norm: stop at the next save or log, or skip the step (device syncs).
_C.SOLVER.ON_NONFINITE = "stop"
# Maximum number of consecutive skipped steps.
_C.SOLVER.MAX_SKIPPED_STEPS = 10
# Automatic mixed precision: float16 (with a gradient scaler) or bfloat16.
_C.SOLVER.AMP = CN()
_C.SOLVER.AMP.ENABLED = False
_C.SOLVER.AMP.PRECISION = "float16"
# Number of processes the config is written for, as in Detectron2: with k times as many, batch size and
# learning rate are multiplied by k, numbers of iterations divided by k. 0: off.
_C.SOLVER.REFERENCE_WORLD_SIZE = 0
# Batch size the config is written for: with IMS_PER_BATCH k times as large, the learning rate is multiplied
# by k, numbers of iterations are divided by k. 0: off.
_C.SOLVER.REFERENCE_IMS_PER_BATCH = 0

_C.DEBUG = CN()
# Save the samples of a batch with a NaN or infinite loss or gradient as OUTPUT_DIR/bad_batch_N.pth.
_C.DEBUG.DUMP_BAD_BATCH = False

# ---- test ------------------------------------------------------------------------------------
_C.TEST = CN()
# Iterations between evaluations; 0: only at the end. epoch_train_net.py evaluates at the end of the epoch.
_C.TEST.EVAL_PERIOD = 0
# Iterations before the first evaluation; 0: EVAL_PERIOD.
_C.TEST.EVAL_START = 0
# Iterations between computations of the losses on DATASETS.TEST; 0: never.
_C.TEST.VAL_LOSS_PERIOD = 0
# Metric that selects model_best.pth and triggers early stopping: "" (none), auto (the first), bbox/AP,
# coco_2017_val/bbox/AP (of several datasets), val/total_loss, ... Higher is better, except for losses.
_C.TEST.BEST_METRIC = ""
# Evaluate with autocast to SOLVER.AMP.PRECISION.
_C.TEST.AMP = False
# [[task, metric, value, tolerance], ...]: the run fails if the final results differ by more.
_C.TEST.EXPECTED_RESULTS = []
# COCO metrics count at most 100 per image and class.
_C.TEST.DETECTIONS_PER_IMAGE = 100
# OKS sigmas, one per keypoint; [] is COCO's for 17 keypoints.
_C.TEST.KEYPOINT_OKS_SIGMAS = []
# Maximum batch size per rank in evaluation; only images of the same resized and padded shape are batched.
_C.TEST.IMS_PER_BATCH = 1
# Test-time augmentation in all evaluations: several sizes and flips, merged by NMS.
_C.TEST.AUG = CN()
_C.TEST.AUG.ENABLED = False
# Shortest sides and maximum of the longest side, pixels; INPUT.FIXED_SIZE is scaled to these shortest sides.
_C.TEST.AUG.MIN_SIZES = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
_C.TEST.AUG.MAX_SIZE = 4000
_C.TEST.AUG.FLIP = True
# Not supported; must be False.
_C.TEST.PRECISE_BN = CN()
_C.TEST.PRECISE_BN.ENABLED = False


def get_cfg() -> CN:
    """Return a copy of the default config."""
    return _C.clone()


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line of names followed by KEY VALUE pairs into (names, overrides).

    The pairs start at the first word that is a key, or that begins with the name of a section and a dot.
    """
    for i, word in enumerate(words):
        section, dot, _ = word.partition(".")
        if section in _C and isinstance(_C[section], CN) == bool(dot):
            return words[:i], words[i:]
    return words, []
