"""Deliberate defects for mutation_check.py, from mutations.txt: below each file `text => text in its place`.

What does not fit into a line has its replacement below it, line by line. Those below `== TEST_FILE` are
planted: the properties of that test file must catch them.
"""

from pathlib import Path


def read_defects(text: str) -> dict[str, list[tuple[str, str]]]:
    """Return {file: [(text, text in its place)]}."""
    defects: dict[str, list] = {}
    for line in text.strip("\n").splitlines():
        if not line.startswith(" "):
            changes = defects.setdefault(line, [])
        elif line.startswith("    =>"):
            changes[-1][1].append(line[7:])
        else:
            old, arrow, new = line[4:].replace("\\n", "\n").partition(" =>")
            changes.append((old, [new[1:]] if arrow else []))
    return {file: [(old, "\n".join(new)) for old, new in changes] for file, changes in defects.items()}


_BLOCKS = Path(__file__).with_name("mutations.txt").read_text(encoding="utf-8").split("\n== ")
MUTATIONS = read_defects(_BLOCKS[0])
PLANTED = {file: read_defects(text) for file, _, text in (block.partition("\n") for block in _BLOCKS[1:])}
