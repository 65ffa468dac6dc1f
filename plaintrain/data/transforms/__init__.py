"""Augmentation of images, boxes, masks and keypoints."""
