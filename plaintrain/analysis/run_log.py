"""The log of a run, log.txt and log.txt.rankN, read as records."""

import contextlib
import os
import re
from collections import namedtuple

from plaintrain.utils.errors import UserError
from plaintrain.utils.files import reason

_LINE = re.compile(r"\[(\d\d/\d\d \d\d:\d\d:\d\d) ([\w.]+)\] ([A-Z]+): (.*)")
_LOG_FILE = re.compile(r"log\.txt(\.rank\d+)?")
# A record of the log that is longer is cut.
_LONGEST = 4000

LogRecord = namedtuple("LogRecord", "time logger level text")


@contextlib.contextmanager
def opened(path):
    """A text file to read, or () where there is none.

    Raises:
        UserError: it is there and cannot be read.
    """
    if not os.path.isfile(path):
        yield ()
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            yield f
    except OSError as e:
        raise UserError(f"{path} cannot be read: {reason(e)}") from e


def read_log(folder):
    """The records of log.txt and log.txt.rankN: {file name: iterator over `LogRecord`}.

    `time` is as in the log, `text` of all lines of the record (the first 4000 characters).
    """
    names = sorted(name for name in os.listdir(folder) if _LOG_FILE.fullmatch(name))
    return {name: _records(os.path.join(folder, name)) for name in names}


def _records(path):
    head, lines, size = None, [], 0
    with opened(path) as f:
        for line in f:
            found = _LINE.match(line)
            if found:
                if head:
                    yield LogRecord(*head, "\n".join(lines))
                *head, text = found.groups()
                lines, size = [text], len(text)
            elif size < _LONGEST:
                lines.append(line.rstrip("\n"))
                size += len(line)
    if head:
        yield LogRecord(*head, "\n".join(lines))


def read_warnings(folder):
    """What was logged as WARNING or worse, by first appearance; those that differ in numbers are one.

    Returns:
        list of dicts: `level`, `text` (of the first), `count` (over all ranks), `first` and `last` (times
        as in the log), `files`.
    """
    found = {}
    for name, records in read_log(folder).items():
        for record in records:
            if record.level in ("INFO", "DEBUG"):
                continue
            key = record.level, re.sub(r"\d+(\.\d+)?", "#", record.text)
            new = {"level": record.level, "text": record.text, "count": 0, "first": record.time, "files": []}
            entry = found.setdefault(key, new)
            entry["count"] += 1
            entry["last"] = record.time
            if name not in entry["files"]:
                entry["files"].append(name)
    return list(found.values())
