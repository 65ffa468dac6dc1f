"""What the scripts say of themselves."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def help_flags(script):
    """The flags in the usage and options that a script prints with --help."""
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    return set(re.findall(r"(?<!\S)--[a-z][\w-]*", re.sub(r"[\[\],]", " ", done.stdout)))
