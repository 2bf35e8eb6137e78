"""Command-line options -> the plain values of a spec. Both roads, file and options, meet at spec.build."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from bench.data import datasets
from bench.planning import catalog
from bench.planning.spec import Spec, build
from bench.planning.strict_yaml import read
from bench.planning.typed import Options

DEFAULT_EPS = {"digits": "0.1", "mnist": "0.1", "fashion_mnist": "0.1"}
DEFAULT_ATTACKS: tuple[dict[str, Any], ...] = (
    {"name": "clean"},
    {"name": "fgsm"},
    {"name": "pgd"},
    {"name": "pgd", "set": {"loss": "cw"}},
    {"name": "autoattack", "n": 100},
)
# attacks that a claim about a stochastic model needs in addition
PROTOCOL_ATTACKS: tuple[dict[str, Any], ...] = (
    {"name": "eot", "n": 100},
    {"name": "closed_form", "n": 100},
    {"name": "transfer", "n": 100},
)
CERTIFY = {"name": "certify", "n": 100, "set": {"n": 10_000}}


def to_spec(options: Options, root: Path) -> tuple[Spec, Path, list[str]]:
    """The Spec, the data root (a `folder:PATH` brings its own), and what was chosen for the user, in words.

    Raises LookupError or ValueError in one line.
    """
    notes: list[str] = []
    values: dict[str, Any] = {}
    if options.spec is not None:
        _check_spec(options.spec)
        values, lines = read(options.spec)
        build(values, str(options.spec), lines)  # the file must stand on its own before options change it
    _section(values, "data", name=options.dataset, test=options.n, size=options.size, train=options.train_n)
    _section(values, "data", validation=options.validation)
    data = values.setdefault("data", {})
    root = _folder(data, root)
    if options.spec is None:
        _defaults(values, options, notes, root)
    if options.model:
        values["models"] = _split(options.model)
    if options.defense and options.spec is not None:
        values["defenses"] = _split(options.defense)
    if options.attack and options.spec is not None:
        values["attacks"] = _split(options.attack)
    if options.spec is not None and options.n is not None:
        for entry in values["attacks"]:  # --n is the most images that any attack of the file sees
            if isinstance(entry, dict) and entry.get("n"):
                entry["n"] = min(int(entry["n"]), options.n)
    if options.seeds:
        values["seeds"] = [_integer("--seeds", s) for s in _split(options.seeds)]
    for name in ("recipe", "checks"):
        if getattr(options, name):
            values[name] = getattr(options, name)
    _section(values, "threat", norm=options.norm, eps=_split(options.eps) or None, train_eps=options.train_eps)
    _section(values, "train", epochs=options.epochs)
    for target, assignments in (("set", options.set), ("grid", options.grid)):
        for assignment in assignments:
            if options.epochs is not None and assignment.startswith("train.epochs="):
                raise ValueError(f"--epochs {options.epochs} and --{target} {assignment}; give one of them")
            _assign(values, target, assignment)
    return build(values), root, notes  # the file was checked above, so what is wrong now was typed


def _check_spec(path: Path) -> None:
    """Say what was probably meant where there is no such file: a spec nearby, or another defense or attack."""
    if path.is_file():
        return
    kinds = [kind.removesuffix("s") for kind in catalog.KINDS if str(path) in catalog.names(kind)]
    if kinds:
        raise FileNotFoundError(f"no spec file {path}; several {kinds[0]}s are separated by commas, without a space")
    places = dict.fromkeys((path.parent, Path("specs")))
    near = {file.stem: file for place in places if place.is_dir() for file in sorted(place.glob("*.y*ml"))}
    found = difflib.get_close_matches(path.stem, near, n=1)
    hint = f"; did you mean {near[found[0]]}?" if found else ""
    raise FileNotFoundError(f"no spec file {path}{' (a folder)' if path.is_dir() else ''}{hint}")


def _defaults(values: dict[str, Any], options: Options, notes: list[str], root: Path) -> None:
    """A whole matrix from as little as `--defense noisy`; every choice made here is told to the user."""
    data = values["data"]
    if "name" not in data:
        data["name"] = "digits"
        notes.append("dataset digits (embedded 8x8 handwritten digits; --dataset to change)")
    defenses = _split(options.defense) if options.defense else ["standard", "noisy", "pgd_at"]
    if not options.defense:
        notes.append(f"defenses {', '.join(defenses)}")
    if options.baseline and defenses and "standard" not in defenses:
        defenses = ["standard", *defenses]
        notes.append("defense standard beside them, the baseline of every ratio (--no-baseline leaves it out)")
    values["defenses"] = defenses
    if not options.eps:
        linf = str(options.norm or "Linf").lower() == "linf"
        values["threat"] = {"eps": [DEFAULT_EPS.get(data["name"], "8/255") if linf else "0.5"]}
        notes.append(f"eps {values['threat']['eps'][0]}")
    if options.attack:
        values["attacks"] = _split(options.attack)
    else:
        limit = options.n or datasets.facts(data["name"], root, data.get("size")).test
        norm = _norm(options.norm)
        fit = [a for a in DEFAULT_ATTACKS if norm in catalog.get("attacks", a["name"]).norms]
        # images that were asked for are for every attack; otherwise the slow one takes few of them
        attacks = [{**a, "n": options.n or min(a["n"], limit)} if "n" in a else dict(a) for a in fit]
        kinds = {catalog.get("defenses", name).predictor for name in defenses}
        if kinds != {"deterministic"}:
            attacks += [{**a, "n": options.n or min(a["n"], limit)} for a in PROTOCOL_ATTACKS]
        if "smoothed" in kinds:
            attacks.append({**CERTIFY, "n": options.n or min(100, limit)})
        if len(_split(options.eps)) > 1:
            attacks.append({"name": "curve"})
        values["attacks"] = attacks
        notes.append("attacks " + ", ".join(_told(a) for a in attacks))


def _norm(typed: str | None) -> str:
    """The norm as the spec will read it; one that it will refuse keeps all attacks."""
    return {"l2": "L2", "l1": "L1"}.get((typed or "").lower(), "Linf")


def _told(attack: dict[str, Any]) -> str:
    extra = [f"{k}={v}" for k, v in attack.get("set", {}).items()] + ([f"n={attack['n']}"] if "n" in attack else [])
    return attack["name"] + (f" ({', '.join(extra)})" if extra else "")


def _folder(data: dict[str, Any], root: Path) -> Path:
    """`folder:PATH` becomes `folder:NAME` under its parent, so that records hold no path of this machine."""
    if "name" in data:
        data["name"], root = place(str(data["name"]), root)
    return root


def place(name: str, root: Path) -> tuple[str, Path]:
    """Name and data root of a data set as typed."""
    folder = Path(name.removeprefix("folder:")).expanduser()
    if name.startswith("folder:") and folder.is_dir():
        return f"folder:{folder.resolve().name}", folder.resolve().parent
    return name, root


def _section(values: dict[str, Any], section: str, **given: Any) -> None:
    """Put what was typed into a section of the spec."""
    typed = {name: value for name, value in given.items() if value is not None}
    if typed:
        values[section] = {**(values.get(section) or {}), **typed}


def _split(words: list[str]) -> list[str]:
    return [part.strip() for word in words for part in word.split(",") if part.strip()]


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} takes whole numbers such as 0,1,2, got '{text}'") from None


def _assign(values: dict[str, Any], target: str, assignment: str) -> None:
    """`noisy.sigma=0.6`: a setting of every entry of that name, among defenses, attacks and models; or of `train`."""
    left, equals, right = assignment.partition("=")
    owner, dot, name = left.partition(".")
    if not (equals and dot and name):
        raise ValueError(f"--{target} takes NAME.SETTING=VALUE such as noisy.sigma=0.6, got '{assignment}'")
    if owner == "train":
        if target == "grid":
            raise ValueError(f"--grid {assignment}: settings of train have one value each; use --set {left}=VALUE")
        values["train"] = {**(values.get("train") or {}), name: value(right)}
        return
    found = False
    for section in ("defenses", "attacks", "models"):
        entries: list[dict[str, Any]] = [{"name": e} if isinstance(e, str) else e for e in values.get(section) or []]
        values[section] = entries or values.get(section)
        for entry in entries:
            if entry["name"] == owner:
                found = True
                given: Any = [value(part) for part in right.split(",")] if target == "grid" else value(right)
                entry.setdefault(target, {})[name] = given
                if target == "grid":
                    entry.get("set", {}).pop(name, None)
        if section == "models" and not entries:
            values.pop("models", None)
    if not found:
        known = [e["name"] for s in ("defenses", "attacks", "models") for e in values.get(s) or []]
        kinds = [kind.removesuffix("s") for kind in catalog.KINDS if owner in catalog.names(kind)]
        hint = f" Add it with --{kinds[0]} {owner}, or leave this out" if kinds else catalog.suggest(owner, known)
        raise LookupError(f"--{target} {assignment}: '{owner}' is not in this run.{hint}")


def value(text: str) -> Any:
    """true and false are booleans, null is None, [a,b] a list; numbers stay text and are read by the setting's type."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    if text == "null":
        return None
    if text.startswith("[") and text.endswith("]"):
        # --grid has commas between its values, so that a list there needs another separator
        return [value(part) for part in text[1:-1].split(";" if ";" in text else ",") if part.strip()]
    return text
