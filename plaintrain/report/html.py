"""The pieces of an HTML page. What is no `Html` is text, and is escaped wherever it is put."""

import base64
import html
import math
from importlib import resources

from plaintrain.plots import svg_text


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value):
    """A value as `Html`: itself if it is, else escaped; numbers in a short form, None and NaN as a dash."""
    if isinstance(value, Html):
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Html("–")
    return Html(html.escape(number(value) if isinstance(value, float) else str(value)))


def number(value):
    """A float in at most 4 digits, whole ones from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def score(value):
    """A score, 0 to 100, with one decimal; "–" where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def tag(name, *content, **attributes):
    """An element; of an attribute's name a trailing underscore is dropped, and others become hyphens."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{''.join(map(text, content))}</{name}>")


def page_id(name):
    """A name with letters, digits and hyphens only."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def join(parts):
    return Html("".join(map(text, parts)))


def note(*content):
    """A sentence that stands out a little: what is missing, and why."""
    return tag("p", *content, class_="note")


class Cell:
    """A table's cell that is shown in another way than it is sorted: `shown`, `value`, marked as `best`."""

    def __init__(self, shown, value=None, best=False):
        self.shown, self.value, self.best = shown, value, best


def score_cell(value, best=False):
    """A score, 0 to 100 or NaN, as a cell."""
    return Cell(score(value), value if value is not None and math.isfinite(value) else -1.0, best)


def table(columns, rows, caption="", sortable=True):
    """A table within a box that scrolls sideways; a click on a column's name sorts by it.

    Args:
        columns: names.
        rows: lists of cells: text, numbers, None, `Html` or `Cell`.
        caption: what it shows.
        sortable: whether it can be sorted.
    """
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    heads = []
    for name, right in zip(columns, numeric, strict=True):
        content = tag("button", name, type="button") if sortable else text(name)
        sort = {"aria_sort": "none"} if sortable else {}
        heads.append(tag("th", content, scope="col", **_right(right), **sort))
    body = [tag("tr", *(_cell(c, n) for c, n in zip(row, numeric, strict=True))) for row in rows]
    content = [tag("caption", caption)] if caption else []
    content += [tag("thead", tag("tr", *heads)), tag("tbody", *body)]
    kind = {"class_": "sortable"} if sortable else {}
    name = {"aria_label": caption or ", ".join(map(str, columns[:4]))}
    # A box that scrolls can be reached and scrolled by keys.
    return tag("div", tag("table", *content, **kind), class_="scroll", tabindex="0", role="region", **name)


def _is_number(cell):
    value = cell.value if isinstance(cell, Cell) else cell
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _right(is_number, best=False):
    names = ["number"] * is_number + ["best"] * best
    return {"class_": " ".join(names)} if names else {}


def _cell(cell, numeric):
    cell = cell if isinstance(cell, Cell) else Cell(cell, cell if _is_number(cell) else None)
    value = cell.value
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    given = {} if value is None else {"data_value": value}
    return tag("td", cell.shown, **_right(numeric, cell.best), **given)


def facts(pairs, compact=False):
    """Names and values, one pair a line, or beside each other; pairs without a value are left out."""
    shown = [(name, value) for name, value in pairs if value not in (None, "")]
    kind = "facts compact" if compact else "facts"
    return tag("dl", *(tag("div", tag("dt", n), tag("dd", v)) for n, v in shown), class_=kind)


def cards(items):
    """The few numbers that matter most, large: (name, value, remark)."""
    parts = [
        tag("div", tag("span", n), tag("strong", v), tag("small", remark), class_="card")
        for n, v, remark in items
    ]
    return tag("div", *parts, class_="cards")


def figure(drawing, name, title, description="", wide=False):
    """A drawing of matplotlib's under its title; a wide one needs more room than others.

    Args:
        drawing: the matplotlib `Figure`.
        name: another for each figure of the page.
        title, description: texts; the description may be "".
        wide: whether it needs more room.
    """
    label = html.escape(f"{title}. {description}" if description else title)
    svg = svg_text(drawing, page_id(name))
    svg = Html(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
    words = [tag("small", description)] if description else []
    return tag("figure", tag("figcaption", title, *words), svg, class_="plot wide" if wide else "plot")


def grid(figures):
    """Figures beside each other as far as there is room."""
    return tag("div", *figures, class_="grid")


def picture(jpeg, alternative, caption=""):
    """A JPEG, bytes, within the page; a click enlarges it."""
    data = base64.b64encode(jpeg).decode()
    image = Html(f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(alternative)}">')
    button = tag("button", image, type="button", class_="zoom", title="Enlarge")
    return tag("figure", button, *([tag("figcaption", caption)] if caption else []))


def details(summary, *content, is_open=False):
    """What is unfolded by a click."""
    return tag("details", tag("summary", summary), *content, **({"open": ""} if is_open else {}))


def page(title, subtitle, sections):
    """The whole file.

    Args:
        title, subtitle: text; the subtitle may be `Html`.
        sections: (id, title, `Html`) each.
    """
    folder = resources.files(__package__)
    css, js = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    links = [tag("a", name, href=f"#{id_}") for id_, name, _ in sections]
    toggle = tag("button", "Theme", type="button", id="theme", aria_label="Theme: as the system")
    header = tag("header", tag("div", tag("h1", title), tag("p", subtitle)), toggle)
    nav = tag("nav", *links, aria_label="Sections")
    main = tag("main", *(tag("section", tag("h2", name), body, id=id_) for id_, name, body in sections))
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Html(css)),
    ]
    body = tag("body", header, tag("div", nav, main, class_="page"), tag("script", Html(js)))
    return "<!doctype html>\n" + tag("html", tag("head", *head), body, lang="en")
