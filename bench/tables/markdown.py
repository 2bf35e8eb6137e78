"""Text as Markdown: escaped cells, tables, and the marked part of a file that is generated."""

from __future__ import annotations

import re
from pathlib import Path

from bench.terminal import printable

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEAD = "# Leaderboard\n\nWritten by `bench leaderboard`: text between the markers is replaced, the rest is kept.\n\n"


class Markdown(str):
    """Text that is Markdown already, in which every name was escaped."""


def link(text: str, target: str | None) -> Markdown:
    """Text as a link to an address of our own making; without one, plain text."""
    return Markdown(f"[{escape(text)}]({target})" if target else escape(text))


def anchor(heading: str) -> str:
    """The target under which GitHub lists a heading: `mnist, Linf eps = 0.1` is `mnist-linf-eps--01`."""
    return re.sub(r"[^\w\- ]", "", printable(heading).lower()).replace(" ", "-")


def escape(text: str) -> str:
    """Text as one Markdown table cell: nothing in it is syntax, HTML or a line break."""
    marked = re.sub(r"([\\`*_~\[\]|$#])", r"\\\1", printable(text).replace("&", "&amp;"))
    marked = marked.replace("://", "&#58;//")  # GitHub would make a link of it
    marked = re.sub(r"(?i)\b(www)\.", r"\1&#46;", marked)
    return marked.replace("<", "&lt;").replace(">", "&gt;").strip()


def item(text: str) -> str:
    """Text as one item of a list: it begins no list, number or rule of its own."""
    return "- " + re.sub(r"^(\d*)([-+.)])", r"\1\\\2", escape(text))


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with every cell escaped, except those that are `Markdown`."""
    rule = ["---"] * len(header)
    shown = [[cell if isinstance(cell, Markdown) else escape(cell) for cell in line] for line in (header, *lines)]
    cells = [shown[0], rule, *shown[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def replace_block(path: Path, block: str) -> str:
    """The file's text with `block` between the markers. Raises ValueError where the markers are not one pair."""
    text = path.read_bytes().decode("utf-8") if path.exists() else HEAD
    begin, end = text.count(BEGIN), text.count(END)
    if (begin, end) == (0, 0):
        text = f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{BEGIN}{END}\n"
    elif (begin, end) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must hold one '{BEGIN}' and then one '{END}'; found {begin} and {end}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}{END}{rest.partition(END)[2]}"
