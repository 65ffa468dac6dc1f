"""The assertion that tests of broken and hostile files share."""

import resource
import time

import pytest

from plaintrain.config import get_cfg
from plaintrain.utils.errors import UserError

# No rejection may take longer, or make the process larger by more: all are far below it.
SECONDS, MEGABYTES = 8, 300


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rejected(*words, by):
    """Assert that `by()` raises a UserError of one line with the words, in bounded time and memory."""
    start, memory = time.perf_counter(), _peak()
    with pytest.raises(UserError) as error:
        by()
    assert time.perf_counter() - start < SECONDS
    assert _peak() - memory < MEGABYTES
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) <= 1000
    assert [word for word in words if str(word) not in message] == [], message


def merge(path):
    """Merge a config file."""
    get_cfg().merge_from_file(path)
