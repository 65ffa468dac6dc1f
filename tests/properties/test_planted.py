"""Each planted defect of tests/mutations.txt is caught by the properties of its test file."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / "mutation_check.py"


@pytest.mark.long
def test_properties_catch_their_planted_defects():
    command = [sys.executable, CHECK, "planted", "--seconds", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
