"""matplotlib's SVG -> SVG inside a page: it obeys the content policy, follows the theme and is a third as long."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from bench.terminal import printable

INK = "#1b1f24"  # what becomes the page's text color
MARK, PART = "mark-", "part-"  # ids of what shows one model, and of a panel, before the mark of the model
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_GROUP, _TEXT, _DEFS = (f"{{{_SVG}}}{tag}" for tag in ("g", "text", "defs"))
_LEFT_OUT = (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")
_PLACES = ("d", "x", "y", "transform", "points", "width", "height")


def inline(content: bytes, name: str, alt: str, boxes: Sequence[tuple[float, ...]] = ()) -> str:
    """SVG as a part of a page: style attributes, which the content policy forbids, become attributes of their own, and
    the id of what shows a model becomes its attribute `data-m`.

    Args:
        boxes: Left, top, width and height of each panel as shares of the whole; each becomes an SVG of its own.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(content)
    used = set(re.findall(rb"#([\w-]+)", content))
    parts = [element for element in root.iter(_GROUP) if element.get("id", "").startswith(PART)]
    for element in root.iter():
        _restyle(element)
        known = element.get("id", "")
        if known.startswith((MARK, PART)) and (mark := known.partition("-")[2]):
            element.set("data-m", mark)
        if "id" in element.attrib and known.encode() not in used:
            del element.attrib["id"]
    _flatten(root, parts)
    own = "s" + hashlib.sha256(name.encode()).hexdigest()[:6]
    names: dict[str, str] = {}
    for element in root.iter():
        element.attrib |= {key: _attribute(key, value, own, names) for key, value in element.attrib.items()}
    _, _, *size = map(float, root.attrib["viewBox"].split())
    if not boxes:
        return _drawn(root, (0, 0, *size), alt)
    texts = []
    rest = [child for child in root if child.tag == _DEFS]  # what panels refer to
    for k, (part, (x, y, width, height)) in enumerate(zip(parts, boxes, strict=False), 1):
        panel = ElementTree.Element(root.tag)
        panel.extend([part, *(rest if k == 1 else [])])
        box = x * size[0], y * size[1], width * size[0], height * size[1]
        texts.append(_drawn(panel, box, f"{alt} Panel {k} of {len(parts)}."))
    return "".join(texts)


def _drawn(root: ElementTree.Element, box: tuple[float, ...], alt: str) -> str:
    root.attrib = {
        "viewBox": " ".join(f"{value:.1f}".removesuffix(".0") for value in box),
        "role": "img",
        "aria-label": printable(alt),
        "width": f"{box[2] * 4 / 3:.0f}",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _flatten(parent: ElementTree.Element, kept: list[ElementTree.Element]) -> None:
    """Remove groups without attributes except for those kept, empty groups and the line breaks between elements."""
    if parent.tag == _TEXT:
        return
    children: list[ElementTree.Element] = []
    for child in list(parent):
        if child.tag in _LEFT_OUT:
            continue
        _flatten(child, kept)
        if child.tag == _GROUP and not child.attrib and child not in kept:
            children += list(child)
        elif child.tag != _GROUP or len(child):
            children.append(child)
    parent[:] = children
    parent.text = None
    for child in children:
        child.tail = None


def _attribute(key: str, value: str, own: str, names: dict[str, str]) -> str:
    """Ids that are unique in the page; coordinates rounded to a tenth of a point."""

    def short(known: str) -> str:
        return f"{own}-{names.setdefault(known, str(len(names)))}"

    if key == "id":
        return short(value)
    if key in ("href", f"{{{_XLINK}}}href"):
        return f"#{short(value[1:])}" if value.startswith("#") else value
    if value.startswith("url(#"):
        return f"url(#{short(value[5:-1])})"
    return _rounded(value) if key in _PLACES and not value.startswith(("matrix", "scale")) else value


def _rounded(value: str) -> str:
    tenths = re.sub(r"\d+\.\d+", lambda found: f"{float(found.group()):.1f}".removesuffix(".0"), value)
    return re.sub(r" *([MLCQz]) *", r"\1", tenths).strip()


def _restyle(element: ElementTree.Element) -> None:
    turned = re.sub(r"rotate\(-?0 [^)]*\)", "", element.attrib.pop("transform", "")).strip()  # by nothing
    element.attrib |= {"transform": turned} if turned else {}
    declared = (part.partition(":") for part in element.attrib.pop("style", "").split(";"))
    for key, value in ((key.strip(), value.strip()) for key, _, value in declared):
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            element.attrib |= {"font-size": size.group(1)} if size else {}
        elif key and key != "font-family":
            element.attrib[key] = "currentColor" if value == INK else value
    for key in ("fill", "stroke"):
        if element.attrib.get(key) == INK:
            element.attrib[key] = "currentColor"
