"""plaintrain.data.transforms as Detectron2's `T`, alone and inside `DatasetMapper`."""

import numpy as np
import pytest

from plaintrain.data import DatasetCatalog, DatasetMapper
from plaintrain.data import detection_utils as utils
from plaintrain.data import transforms as T
from plaintrain.data.keypoints import create_keypoint_hflip_indices
from plaintrain.data.transforms.geometric import RandomHorizontalFlip
from plaintrain.utils.errors import UserError


class Flip(T.Augmentation):
    def get_transform(self, image, boxes):
        assert image.shape[2] == 3 and boxes.shape[1] == 4
        return T.HFlipTransform(image.shape[1])


def test_augmentations_in_the_mapper_transform_all_targets_and_draw_from_the_sample(cfg):
    def load(*augmentations, seed=0):
        mapper = DatasetMapper(cfg, augmentations=augmentations)
        sample = mapper(DatasetCatalog.get("shapes_train")[0], np.random.default_rng(seed))
        return {"image": sample["image"], **sample["target"]}

    cfg.DATASETS.TRAIN = ("shapes_train",)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    expected = load(RandomHorizontalFlip(1.0, create_keypoint_hflip_indices(["shapes_train"])))
    for flip in (Flip(), T.RandomFlip(1.0), T.HFlipTransform(128), T.AugmentationList([Flip()])):
        actual = load(flip)
        assert len(expected) == 5 and all(actual[name].equal(expected[name]) for name in expected)
    before = np.random.get_state()[1].copy()
    assert load(T.RandomFlip(), seed=3)["image"].equal(load(T.RandomFlip(), seed=3)["image"])
    assert len({load(T.RandomFlip(), seed=i)["boxes"].sum().item() for i in range(9)}) == 2
    assert (np.random.get_state()[1] == before).all()
    own = T.Transform()
    own.apply_image = own.apply_coords = np.copy
    assert load(own)["boxes"].equal(load()["boxes"])


def test_transforms_of_numpy_arrays():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    aug_input = T.AugInput(image, boxes=np.array([[10.0, 20, 30, 40]]))
    augs = [T.ResizeShortestEdge(20, 100), T.RandomFlip(1.0), T.CropTransform(2, 3, 20, 10)]
    transforms = T.AugmentationList(augs)(aug_input)
    np.testing.assert_array_equal(transforms.apply_image(image), aug_input.image)
    np.testing.assert_allclose(aug_input.boxes, [[13, 7, 23, 17]])
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[20:, 10:30] = 1
    assert (transforms.apply_segmentation(mask)[7:, 13:] == 1).all()


@pytest.mark.parametrize(
    "aug", [Flip(), T.CropTransform(20, 30, 70, 80), T.RandomFlip(1.0, vertical=True, horizontal=False)]
)
def test_mapper_of_detectron2_makes_the_target_of_the_mapper(cfg, aug):
    cfg.DATASETS.TRAIN = ("shapes_train",)
    cfg.MODEL.KEYPOINT_ON = True
    record = DatasetCatalog.get("shapes_train")[0]
    expected = DatasetMapper(cfg, augmentations=[aug])(record)
    image = utils.read_image(record["file_name"], format="BGR")
    utils.check_image_size(record, image)
    aug_input = T.AugInput(image, boxes=np.zeros((0, 4)))
    transforms = T.AugmentationList([aug])(aug_input)
    size = aug_input.image.shape[:2]
    order = utils.create_keypoint_hflip_indices(["shapes_train"])
    annotations = [
        utils.transform_instance_annotations(a, transforms, size, keypoint_hflip_indices=order)
        for a in record["annotations"]
    ]
    target = utils.filter_empty_instances(utils.annotations_to_target(annotations, size))
    np.testing.assert_array_equal(aug_input.image[:, :, ::-1].transpose(2, 0, 1), expected["image"])
    for name, value in expected["target"].items():
        np.testing.assert_allclose(target[name], value, atol=1e-4)
    with pytest.raises(UserError, match=r"annotations_to_target\(annotations, image_size\)"):
        utils.annotations_to_instances(annotations, size)
