"""Broken versions of JSON, XML, YAML, images and other files: of their bytes, or of the tree they hold."""

import contextlib
import copy
import io
import json
import xml.etree.ElementTree as ElementTree

import torch
import yaml

# What is inserted into the bytes of a file; of a line, the words between spaces.
_WORDS = r"""
NaN -Infinity 1e999 -1 0 null true {} [] "" ../ ~ \ud800 ' " : # % | {[]}
1_0 1:30:59 2001-99-99 0o9 __class__ *a --- &lt; &b; <![CDATA[ <a> </object> <!--
"""
_LINES = r"""
<<: *solver
&a [*a]
({[]: 1})
!!python/object/apply:os.system [x]
!!timestamp x
!!int ""
!!map [a]
!!set {a}
!!binary x
!!omap [a]
<!DOCTYPE a [<!ENTITY b 'c'>]>
"""
_TOKENS = [
    *(word.encode() for word in _WORDS.split()),
    *(line.encode() for line in _LINES.strip("\n").splitlines()),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", "\u0661\u2028\u00e9".encode(), b"\n", b"\r", b"\t", b" "),
    *(b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 3000, b'{"a":' * 500, b"<a>" * 5000, b"<" * 99),
    *(b"(" * 150, b"-" * 9000 + b"1", b"- ", b"? [a]\n: b", b"? {a: b}\n: c"),
]
_STRINGS = """a NaN 1e999 ../../x.png /etc/passwd shapes://train/1 __class__ __immutable__ . /"""
_MASKS = [
    {"size": [30, 40], "counts": "0" * 20 + "o" * 40},
    {"size": 3, "counts": 4},
    {"size": [30, 40], "counts": "\ud800"},
    {"size": [10**6, 10**6], "counts": [10**12]},
]
_VALUES = [
    *(float("nan"), float("inf"), 1e308, -1e308, 1e-320, -1, 0, 1, 2, 3, 1.5, None, True, False, {}, [], ""),
    *(10**400, -(10**18), 2**63, 2**31, 10**9, "9" * 5000, "\ud800", "\u0661", "a\0b", "\n", " ", "x" * 3000),
    *([[]], [{}], [None], {"a": {}}, {"": None}, [1, 2, 3, 4], [1e308] * 4, ["a"] * 4, [[1, 2], [3]]),
    *([0, 0, 3], [[1e9, 1e9, -1e9, 1e9, 0, 0]], *_MASKS, *_STRINGS.split()),
]


_TENSORS = [
    *(
        torch.Tensor.double,
        torch.Tensor.long,
        torch.Tensor.bool,
        torch.Tensor.to_sparse,
        torch.Tensor.flatten,
    ),
    *(lambda t: t[None], lambda t: t.new_zeros(()), lambda t: t.new_zeros(0), lambda t: t.to("meta")),
    *(lambda t: t * float("nan"), lambda t: t - 2**40, lambda t: t.to(torch.complex64)),
    *(lambda t: t.new_zeros(1).expand(2**45), lambda t: t.flatten()[:1], lambda t: torch.rand(t.shape)),
]


def mutate(path, data, rng):
    """Return `data`, the bytes of the file `path`, broken as `rng` (random.Random) says."""
    change_tree = _TREES.get(path.rsplit(".", 1)[-1])
    if change_tree and rng.random() < 0.5:
        data = change_tree(data, rng)
        if rng.random() < 0.9:
            return data
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        data = _change_bytes(data, rng)
    return data


def _change_bytes(data, rng):
    """Change one place in the bytes."""
    i, j = rng.randint(0, len(data)), rng.randint(0, len(data))
    token = rng.choice([*_TOKENS, rng.randbytes(8)])
    change = rng.choice(("flip", "cut", "remove", "splice", "insert", "insert", "word", "word"))
    if change == "flip":
        byte = (data[i : i + 1] or b"\x00")[0]
        return data[:i] + bytes([byte ^ (1 << rng.randrange(8))]) + data[i + 1 :]
    if change == "word":
        words = data.split(b" ")
        words[rng.randrange(len(words))] = token
        return b" ".join(words)
    ends = {
        "cut": b"",
        "remove": data[i + rng.randint(1, 30) :],
        "splice": data[j : j + rng.randint(0, 60)] + data[i:],
        "insert": token + data[i:],
    }
    return data[:i] + ends[change]


def _places(tree):
    """Return [(container, key)] of everything in a tree of dicts and lists."""
    places, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return places


def _nested(value, rng):
    for _ in range(rng.choice((1, 3, 150, 400, 900))):
        value = [value] if rng.random() < 0.7 else {"a": value}
    return value


def _change(tree, rng):
    """Change one thing in the tree."""
    places = _places(tree)
    if not places:
        return copy.deepcopy(rng.choice(_VALUES))
    (node, key), (other, other_key) = rng.choice(places), rng.choice(places)
    change = rng.choice(("value", "value", "value", "delete", "copy", "nest", "move"))
    if change == "value":
        node[key] = copy.deepcopy(rng.choice(_VALUES))
    elif change == "delete":
        del node[key]
    elif change == "copy":
        node[key] = copy.deepcopy(other[other_key])
    elif change == "nest":
        node[key] = _nested(node[key], rng)
    elif isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[rng.choice(("__class__", "extra", "", "file_name", "size", "\u0661"))] = node.pop(key)
    return tree


def _changes(tree, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        with contextlib.suppress(RecursionError):  # Of what is nested deeply no copy is made.
            tree = _change(tree, rng) if isinstance(tree, dict | list) else tree
    return tree


def _change_json(data, rng):
    try:
        text = json.dumps(_changes(json.loads(data), rng), ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        return data
    return text.encode(errors="surrogatepass")


def _change_yaml(data, rng):
    tree = _changes(yaml.safe_load(data), rng)
    try:
        # JSON is YAML, nearly, and has other words for what is no number.
        text = yaml.safe_dump(tree, allow_unicode=True) if rng.random() < 0.5 else json.dumps(tree)
    except (RecursionError, ValueError, TypeError):
        return data
    return text.encode(errors="surrogatepass")


def _change_xml(data, rng):
    root = ElementTree.fromstring(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parent = rng.choice([element for element in root.iter() if len(element)] or [root])
        child = rng.choice([*parent] or [ElementTree.SubElement(parent, "a")])
        change = rng.choice(("text", "text", "remove", "copy", "rename", "nest"))
        if change == "text":
            value = rng.choice(_VALUES)
            child.text = "1" + "0" * 400 if value == 10**400 else str(value)
        elif change == "remove":
            parent.remove(child)
        elif change == "copy":
            parent.append(copy.deepcopy(rng.choice(list(root.iter()))))
        elif change == "rename":
            child.tag = rng.choice(("size", "name", "object", "bndbox", "xmin", "width", "annotation"))
        else:
            for _ in range(rng.choice((1, 50, 400))):
                child = ElementTree.SubElement(child, rng.choice(("object", "a")))
    return ElementTree.tostring(root).replace(b"\x00", b"")


def _change_checkpoint(data, rng):
    tree = torch.load(io.BytesIO(data), weights_only=True)
    node, key = rng.choice([place for place in _places(tree) if isinstance(place[0][place[1]], torch.Tensor)])
    if rng.random() < 0.3:
        node[key] = rng.choice(_TENSORS)(node[key])
    elif rng.random() < 0.5:
        # Most places are those of tensors.
        name = rng.choice(list(tree))
        tree[name] = _changes(tree[name], rng)
    file = io.BytesIO()
    with contextlib.suppress(RecursionError):
        torch.save(tree if rng.random() < 0.5 else _changes(tree, rng), file)
    return file.getvalue() or data


_TREES = {"pth": _change_checkpoint, "json": _change_json, "yaml": _change_yaml, "xml": _change_xml}
