"""The specs that come with bench: in its own package where it was installed, in `specs/` of a checkout."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Where the specs are."""
    installed = PACKAGE / "specs"
    return installed if installed.is_dir() else PACKAGE.parent / "specs"


def names() -> dict[str, Path]:
    """Each spec by its name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def summary(path: Path) -> str:
    """What a spec is about: the comment that it begins with, up to its first period or colon."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#   "):
            break
        comment.append(line.removeprefix("#").strip())
    return re.split(r"[.:](?: |$)", " ".join(comment))[0]
