"""What the scripts say of themselves, and of a wrong command line."""

import re
import tempfile
from functools import cache

from processes import ROOT, run_script


@cache
def help_flags(script):
    """The flags in the usage and options that a script prints with --help."""
    with tempfile.TemporaryDirectory() as folder:
        usage = script_output(ROOT / script, "--help", folder=folder)
        return set(re.findall(r"(?<!\S)--[a-z][\w-]*", re.sub(r"[\[\],]", " ", usage)))


def script_output(script, *args, folder, **kwargs):
    """Run a script, check that it ends well, and return what it prints; see `processes.run_script`."""
    return run_script(script, *args, folder=folder, code=0, **kwargs).output


def assert_refused(script, args, words, folder, codes=(1, 2), **kwargs):
    """Check that a script ends with one of the codes and a sentence, without a traceback.

    Args:
        script, args, kwargs: see `processes.run_script`.
        words: part of the sentence.
        folder: where it runs, and where its log is.
        codes: exit codes; 2 is that of a wrong command line.
    """
    done = run_script(script, *args, folder=folder, cwd=folder, **kwargs)
    assert done.code in codes and words in done.output and "Traceback" not in done.output, done.output
