"""`bench doctor`: which packages are imported, and do they fit together where an installer would not say?"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

from bench.planning import catalog

OLD_REQUESTS = (2, 32, 4)  # versions before it have published advisories
Line = tuple[str, str]  # OK, WARN or FAIL, and what to say


def lines() -> list[Line]:
    """Lines about bench's own packages, and about torchattacks and what it brings along or overwrites."""
    return [*own_packages(), torchattacks(), *robustbench(), *requests()]


def own_packages() -> list[Line]:
    """Where bench and its plug-ins are imported from, and which folders and files of the same name come behind them."""
    found: list[Line] = [("OK", f"bench from {catalog.ROOT / 'bench'}")]
    for kind in ("attacks", "defenses"):
        own = catalog.built_in(kind)  # type: ignore[arg-type]
        others = [
            place
            for entry in sys.path
            for place in (Path(entry, kind).resolve(), Path(entry, f"{kind}.py").resolve())
            if place != own and (place.is_file() or (place.is_dir() and any(place.glob("*.py"))))
        ]
        behind = f"; behind it {', '.join(map(str, dict.fromkeys(others)))}" if others else ""
        found.append(("OK", f"{kind} from {own}{behind}"))
    return found


def torchattacks() -> Line:
    """Is it here?"""
    if importlib.util.find_spec("torchattacks") is None:
        return "WARN", "torchattacks is missing (only its own attacks need it); pip install --no-deps torchattacks"
    return "OK", f"torchattacks {version('torchattacks')}"


def robustbench() -> list[Line]:
    """torchattacks ships a `robustbench` of 2022 at the top level, and whichever is installed second overwrites."""
    theirs = _found("torchattacks")
    if theirs is None or not any(str(file).startswith("robustbench/") for file in theirs.files or []):
        return []
    own = _found("robustbench")
    if own is None:
        return [("WARN", "`import robustbench` gives torchattacks' copy of 2022 here; install RobustBench elsewhere")]
    altered = _altered(own, "robustbench/")
    if not altered:
        return [("WARN", f"torchattacks has lost its files to robustbench {own.version}; bench needs neither of them")]
    return [
        (
            "FAIL",
            f"robustbench {own.version} was overwritten by torchattacks ({altered} files differ); use one environment "
            "for each, and pip install --force-reinstall --no-deps robustbench",
        )
    ]


def requests() -> list[Line]:
    """torchattacks' metadata pins one from 2020."""
    own = _found("requests")
    if own is None:
        return []
    parts = tuple(int(part) for part in own.version.split(".")[:3] if part.isdecimal())
    if parts >= OLD_REQUESTS:
        return [("OK", f"requests {own.version}")]
    wanted = ".".join(map(str, OLD_REQUESTS))
    return [
        (
            "WARN",
            f"requests {own.version} has known security problems: pip install 'requests>={wanted}' "
            "(torchattacks asks for it; install that with --no-deps)",
        )
    ]


def _found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _altered(own: Distribution, folder: str) -> int:
    """How many files of a distribution are not what it installed: gone, or of another SHA-256 than its RECORD says."""
    count = 0
    for file in own.files or []:
        if not str(file).startswith(folder) or file.hash is None or file.hash.mode != "sha256":
            continue
        try:
            digest = hashlib.sha256(file.read_binary()).digest()
        except OSError:
            count += 1
            continue
        count += base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value
    return count
