"""`bench doctor`: the imported packages, and conflicts between them that no installer reports."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

from bench.planning import catalog
from bench.terminal import counted

OLD_REQUESTS = (2, 32, 4)  # versions before it have published advisories
Line = tuple[str, str]  # OK, WARN or FAIL, and a text


def lines() -> list[Line]:
    """Lines about bench's own packages, and about torchattacks and what it installs or overwrites."""
    return [*own_packages(), torchattacks(), *robustbench(), *requests()]


def own_packages() -> list[Line]:
    """Where bench and its plug-ins are imported from, and folders and files of the same name later on the path."""
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
    """Whether torchattacks is installed."""
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
    fault = f"robustbench {own.version} was overwritten by torchattacks ({counted(altered, 'differing file')})"
    todo = "use one environment for each, and pip install --force-reinstall --no-deps robustbench"
    return [("FAIL", f"{fault}; {todo}")]


def requests() -> list[Line]:
    """torchattacks' metadata pins one from 2020."""
    own = _found("requests")
    if own is None:
        return []
    parts = tuple(int(part) for part in own.version.split(".")[:3] if part.isdecimal())
    if parts >= OLD_REQUESTS:
        return [("OK", f"requests {own.version}")]
    wanted = ".".join(map(str, OLD_REQUESTS))
    todo = f"pip install 'requests>={wanted}' (torchattacks asks for it; install that with --no-deps)"
    return [("WARN", f"requests {own.version} has known security problems: {todo}")]


def _found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _altered(own: Distribution, folder: str) -> int:
    """Number of files of a distribution that are missing or have another SHA-256 than its RECORD."""
    count = 0
    # not `own.files`: the backport importlib_metadata, once imported (MLflow does), leaves missing files out of it
    for name, digest, _ in csv.reader((own.read_text("RECORD") or "").splitlines()):
        if name.startswith(folder) and digest.startswith("sha256="):
            path = Path(str(own.locate_file(name)))
            found = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
            count += base64.urlsafe_b64encode(found).rstrip(b"=").decode() != digest.removeprefix("sha256=")
    return count
