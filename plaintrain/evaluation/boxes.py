"""Detections collected as arrays: one row a box, one array a rank to gather."""

import abc

import numpy as np
import torch

from plaintrain.data.catalog import DatasetCatalog
from plaintrain.evaluation.loop import DatasetEvaluator
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


class BoxEvaluator(DatasetEvaluator, abc.ABC):
    """Collects boxes, scores and labels, gathers them on rank 0, and hands them to `score`.

    A row is [index of the image in the dataset, x0, y0, x1, y1, score, label], float64.
    """

    def __init__(self, dataset_name, distributed=True):
        """
        Args:
            dataset_name: a registered dataset; its records are the ground truth.
            distributed: gather over all ranks; otherwise each rank scores what it saw.
        """
        self.dataset_name, self._distributed = dataset_name, distributed
        self.records = DatasetCatalog.get(dataset_name)
        self._index = {record["image_id"]: i for i, record in enumerate(self.records)}
        if len(self._index) != len(self.records):
            raise UserError(f"the dataset {dataset_name} holds an image_id twice")
        self.reset()

    def reset(self):
        self._rows, self._seen = [], []

    def process(self, inputs, outputs):
        for sample, output in zip(inputs, outputs, strict=True):
            index = self._index[sample["image_id"]]
            self._seen.append(index)
            columns = [output["boxes"], output["scores"][:, None], output["labels"][:, None]]
            rows = torch.cat([column.double() for column in columns], dim=1).cpu().numpy()
            self._rows.append(np.concatenate([np.full((len(rows), 1), index), rows], axis=1))

    def evaluate(self):
        """Gather what all ranks processed, and score it on rank 0; None on the others."""
        rows = np.concatenate([np.zeros((0, 7)), *self._rows])
        seen = np.array(self._seen, dtype=np.int64)
        if self._distributed:
            gathered = comm.gather((rows, seen))
            if not comm.is_main_process():
                return None
            rows = np.concatenate([part for part, _ in gathered])
            seen = np.concatenate([part for _, part in gathered])
        # By image, so that results do not depend on how images were split over ranks.
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return self.score(rows, np.unique(seen))

    @abc.abstractmethod
    def score(self, rows, seen):
        """{task: {metric: number}} from all rows `[N, 7]` and the indices of the images seen."""
