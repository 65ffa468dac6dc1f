"""Files of a run's folder that a training writes and reads again: run.json and results.json."""

import contextlib
import json
import os

FACTS_FILE, RESULTS_FILE = "run.json", "results.json"


def read_json(path):
    """Return the content of a JSON file; None if it is missing or cannot be read, as while it is written."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as f:
        return json.load(f)
    return None


def recorded_starts(folder):
    """Return the `starts` of run.json (see `engine.run_facts`), oldest first; [] without any."""
    facts = read_json(os.path.join(folder, FACTS_FILE))
    starts = facts.get("starts") if isinstance(facts, dict) else None
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def read_results_file(folder):
    """Return {dataset: {task: {metric: number or None}}} of a results.json; {} without a whole one."""
    content = read_json(os.path.join(folder, RESULTS_FILE))
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return {d: {t: dict(m) for t, m in tasks.items()} for d, tasks in content.items()}
    return {}
