"""Differences between two configs."""

from plaintrain.config.yaml import flatten, parse_yaml


def config_changes(before, now):
    """[(key, value before, value now)] of two configs, given as YAML texts; a missing value is "-"."""
    before, now = flatten(parse_yaml(before, "the saved config")), flatten(parse_yaml(now, "the config"))
    keys = sorted(before.keys() | now.keys())
    return [(k, before.get(k, "-"), now.get(k, "-")) for k in keys if before.get(k, "-") != now.get(k, "-")]
