"""matplotlib's SVG -> SVG inside a page: it obeys the content policy, follows the theme and is a third as long."""

from __future__ import annotations

import hashlib
import re
from xml.etree import ElementTree

from bench.terminal import printable

INK = "#1b1f24"  # what becomes the page's text color
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_GROUP, _TEXT = f"{{{_SVG}}}g", f"{{{_SVG}}}text"
_LEFT_OUT = (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")
_PLACES = ("d", "x", "y", "transform", "points", "width", "height")


def inline(content: bytes, name: str, alt: str) -> str:
    """SVG as a part of a page: style attributes, which the content policy forbids, become attributes of their own."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(content)
    used = set(re.findall(rb"#([\w-]+)", content))
    for element in root.iter():
        _restyle(element)
        if "id" in element.attrib and element.attrib["id"].encode() not in used:
            del element.attrib["id"]
    _flatten(root)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    box = root.attrib["viewBox"].split()
    root.attrib |= {"role": "img", "aria-label": printable(alt), "width": f"{float(box[2]) * 4 / 3:.0f}"}
    own = "s" + hashlib.sha256(name.encode()).hexdigest()[:6]
    names: dict[str, str] = {}
    for element in root.iter():
        element.attrib |= {key: _attribute(key, value, own, names) for key, value in element.attrib.items()}
    return ElementTree.tostring(root, encoding="unicode")


def _flatten(parent: ElementTree.Element) -> None:
    """Remove groups without attributes, empty groups and the line breaks between elements."""
    if parent.tag == _TEXT:
        return
    children: list[ElementTree.Element] = []
    for child in list(parent):
        if child.tag in _LEFT_OUT:
            continue
        _flatten(child)
        if child.tag == _GROUP and not child.attrib:
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
