"""What the writers of the `EventStorage` have in common."""

import abc
from collections import defaultdict

from plaintrain.utils.files import writing
from plaintrain.utils.storage import get_event_storage


class EventWriter:
    """Base of the writers."""

    def begin(self, start_iter):
        """Remove what an interrupted run wrote from `start_iter` on; by default nothing."""

    def write(self):
        """Read the current storage and put out what is new."""

    def close(self):
        """Nothing to close by default."""


class FileWriter(EventWriter, abc.ABC):
    """Base of the writers to files. Each (iteration, name) is written once.

    A resumed run cuts the files at its start iteration, and skips the values that they already hold: it
    repeats the evaluation and the log row of the iteration of its checkpoint.
    """

    def __init__(self, path, window_size=20):
        self._path = path
        self._window_size = window_size
        self._file = None
        # {name: the last iteration in the file}; None until the file has been cut.
        self._written = None

    @abc.abstractmethod
    def _cut(self, start_iter):
        """Remove the iterations from `start_iter` on; returns {name: last iteration} of the rest."""

    @abc.abstractmethod
    def _append(self, rows):
        """Write {iteration: {name: value}}, in the order of the iterations."""

    def begin(self, start_iter):
        with writing(self._path):
            self._written = self._cut(start_iter)

    def write(self):
        """Append what is new since the last call, and flush."""
        storage = get_event_storage()
        rows = defaultdict(dict)
        if self._written is None:
            self.begin(storage.start_iter)
        for name, (value, at) in storage.latest_with_smoothing_hint(self._window_size).items():
            if at > self._written.get(name, -1):
                rows[at][name] = value
        with writing(self._path):
            self._append(dict(sorted(rows.items())))
            if self._file is not None:
                # Not synchronized with the disk: what the system has survives a killed process.
                self._file.flush()
        self._written |= {name: at for at, row in rows.items() for name in row}

    def close(self):
        if self._file is not None:
            with writing(self._path):
                self._file.close()
            self._file = None
