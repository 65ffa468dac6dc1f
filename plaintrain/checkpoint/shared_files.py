"""Files of rank 0's machine, for the ranks on machines that may have other files in the same place."""

import io
import os
import zlib

from plaintrain.utils import comm
from plaintrain.utils.errors import UserError


def from_rank_0(path):
    """A file of rank 0 on every rank: the path where all see that very file, elsewhere its bytes.

    All ranks call it, and the path of rank 0 counts.

    Returns:
        (rank 0's path, what `torch.load` takes).
    """
    path, facts = comm.broadcast((path, _facts(path)))
    if not comm.any_rank(_facts(path) != facts):
        return path, path
    content = None
    if comm.is_main_process():
        with open(path, "rb") as f:
            content = f.read()
    return path, io.BytesIO(comm.broadcast(content))


def _facts(path):
    """What two files hardly share that are not the same: size and time, to the nanosecond."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def check_same(path, what):
    """Refuse a file that every machine has, but not the same.

    Args:
        path: the file; all ranks call it.
        what: what the file is to the person, such as MODEL.WEIGHTS and its value.

    Raises:
        UserError: names the first rank that has another file than rank 0.
    """
    if comm.get_local_size() == comm.get_world_size():
        return
    sums = comm.all_gather(_checksum(path))
    other = [rank for rank, checksum in enumerate(sums) if checksum != sums[0]]
    if other:
        raise UserError(
            f"{what} is another file on the machine of rank {other[0]} than on that of rank 0: copy it there"
        )


def _checksum(path):
    checksum = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
