"""Names and texts from input, made safe for paths, terminals, logs, pages and figures."""

import re

# Control characters (terminals obey them), marks that reorder text, and lone surrogates (not UTF-8).
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def escape_controls(text: str) -> str:
    r"""Write control characters as escapes such as \x1b, except line breaks and tabs."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def truncate_text(text: str, max_length: int = 24) -> str:
    """Return the text without control characters, cut in its middle to a number of characters."""
    text = escape_controls(text[: 4 * max_length] + text[4 * max_length :][-max_length:])
    head = max_length * 3 // 4
    return text if len(text) <= max_length else f"{text[:head]}…{text[head + 1 - max_length :]}"


def is_file_name(name: object) -> bool:
    """Return whether a value can be the name of a file on all systems; no path, not hidden."""
    return isinstance(name, str) and name == make_file_name(name) != ""


def make_file_name(text: str) -> str:
    """Replace by `_` what a file name cannot hold, and cut it, with room for an extension."""
    text = re.sub(r'[\t\n/\\:*?"<>|]|^[. ]|[. ]$', "_", _CONTROL.sub("_", text))
    return text.encode()[:150].decode(errors="ignore")
