"""The training step, in fixed shapes, of the detectors that score every anchor."""

from plaintrain.modeling.detector import OnSamples, check_boxes, get_targets
from plaintrain.modeling.matching import pad_targets


class DenseOnSamples(OnSamples):
    """Lets a one-stage detector of torchvision take samples, and trains it without its sync points.

    A subclass computes the losses in `_losses`: from the head's outputs, the anchors `[N, 4]`, how many
    locations each level has, and boxes and labels as of `pad_targets`.
    """

    def forward(self, samples):
        """See `OnSamples.forward`."""
        if not self.training:
            return super().forward(samples)
        check_boxes(samples)
        images, _ = self.transform([sample["image"] for sample in samples])
        boxes, labels = pad_targets(get_targets(samples, images.tensors.device))
        features = list(self.backbone(images.tensors).values())
        outputs = self.head(features)
        anchors = self.anchor_generator(images, features)[0]
        levels = [feature.shape[-2] * feature.shape[-1] for feature in features]
        return self._losses(outputs, anchors, levels, boxes, labels)
