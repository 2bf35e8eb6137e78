"""Command-line options -> the values of a spec, which `spec.build` validates as it does those of a file."""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path
from typing import Any

from bench.data import datasets, folders
from bench.planning import catalog, shipped_specs
from bench.planning.evaluations import DEFAULT_N
from bench.planning.labels import label
from bench.planning.spec import Spec, build, norm_named
from bench.planning.strict_yaml import read
from bench.planning.typed import Options
from bench.terminal import counted

DEFAULT_EPS = {"digits": "0.1", "mnist": "0.1", "fashion_mnist": "0.1"}
DEFAULT_ATTACKS: tuple[dict[str, Any], ...] = (
    {"name": "clean"},
    {"name": "fgsm"},
    {"name": "pgd"},
    {"name": "pgd", "set": {"loss": "cw"}},
)
# behind them; the package's, a block at once, since small nets are as fast on it as on 100 images
AUTOATTACK: dict[str, Any] = {"name": "autoattack", "set": {"batch_size": 500}}
AUTOATTACK_FAST: dict[str, Any] = {"name": "autoattack_fast", "set": {"audit": 100}}
# attacks that a claim about a stochastic model needs in addition
PROTOCOL_ATTACKS: tuple[dict[str, Any], ...] = (
    {"name": "eot"},
    {"name": "closed_form"},
    {"name": "transfer"},
)
# not part of the worst case, so that it may be over fewer images
CERTIFY = {"name": "certify", "n": 100, "set": {"n": 10_000}}


def to_spec(options: Options, root: Path, stochastic: bool = False) -> tuple[Spec, Path, list[str]]:
    """The Spec, the data root (a `folder:PATH` brings its own), and the choices made for the user, in words.
    `stochastic`: a model that is no defense of the spec is.

    Raises LookupError or ValueError in one line.
    """
    notes: list[str] = []
    values: dict[str, Any] = {}
    if options.spec is not None:
        path = spec_file(options.spec)
        values, lines = read(path)
        build(values, str(options.spec), lines)  # the file has to be valid before options change it
    data = {"name": options.dataset, "test": options.n, "size": options.size, "train": options.train_n}
    _update(values, "data", **data, validation=options.validation)
    data = values.setdefault("data", {})
    if "name" in data:
        data["name"], root = place(str(data["name"]), root)
    if options.spec is None:
        notes += _fill_defaults(values, options, root, stochastic)
    for section, typed in (("models", options.model), ("defenses", options.defense), ("attacks", options.attack)):
        if typed and (options.spec is not None or section == "models"):
            values[section] = _split(typed)
    if options.spec is not None and options.n is not None:
        for entry in values["attacks"]:  # --n is the most images that any attack of the file gets
            if isinstance(entry, dict) and entry.get("n"):
                entry["n"] = min(int(entry["n"]), options.n)
    if options.seeds:
        values["seeds"] = [_integer("--seeds", seed) for seed in _split(options.seeds)]
    for name in ("recipe", "checks"):
        if getattr(options, name):
            values[name] = getattr(options, name)
    _update(values, "threat", norm=options.norm, eps=_split(options.eps) or None, train_eps=options.train_eps)
    _update(values, "train", epochs=options.epochs)
    for target, assignments in (("set", options.set), ("grid", options.grid)):
        for assignment in assignments:
            if options.epochs is not None and assignment.startswith("train.epochs="):
                raise ValueError(f"--epochs {options.epochs} and --{target} {assignment}; give one of them")
            _assign(values, target, assignment)
    spec = build(values)  # no file in messages: it is valid, so the mistake is on the command line
    return spec, root, [*notes, *_passed_over(spec.data.name, root)]


def spec_file(path: Path) -> Path:
    """The file of a spec: as it was typed, or by the name of one that comes with bench.

    Raises FileNotFoundError for a spec that is not there, and suggests what was meant: a spec nearby, or a plug-in.
    """
    if path.is_file():
        return path
    shipped = shipped_specs.names()
    if str(path) in shipped:
        return shipped[str(path)]
    kinds = [kind.removesuffix("s") for kind in catalog.KINDS if str(path) in catalog.names(kind)]
    if kinds:
        raise FileNotFoundError(f"no spec file {path}; several {kinds[0]}s are separated by commas, without a space")
    places = dict.fromkeys((path.parent, Path("specs")))
    near = {file.stem: file for place in places if place.is_dir() for file in sorted(place.glob("*.y*ml"))}
    near = {**{name: Path(name) for name in shipped}, **near}
    found = difflib.get_close_matches(path.stem, near, n=1)
    hint = f"; did you mean {near[found[0]]}?" if found else ""
    raise FileNotFoundError(f"no spec file {path}{' (a folder)' if path.is_dir() else ''}{hint}")


def _fill_defaults(values: dict[str, Any], options: Options, root: Path, stochastic: bool) -> list[str]:
    """Complete a matrix from as little as `--defense noisy`; gives the choices made, in words."""
    notes, data = list[str](), values["data"]
    if "name" not in data:
        data["name"] = "digits"
        notes.append("dataset digits (embedded 8x8 handwritten digits; --dataset to change)")
    defenses = _split(options.defense) if options.defense else ["standard", "noisy", "pgd_at"]
    if not options.defense:
        notes.append(f"defenses {', '.join(defenses)}")
    if options.baseline and defenses and "standard" not in defenses:
        defenses = ["standard", *defenses]
        notes.append("defense standard in addition, the baseline of every ratio (--no-baseline leaves it out)")
    values["defenses"] = defenses
    norm = norm_named(options.norm or "Linf")
    if not options.eps:
        eps = DEFAULT_EPS.get(data["name"], "8/255") if norm == "Linf" else "0.5"
        values["threat"] = {"eps": [eps]}
        notes.append(f"eps {eps}")
    facts = datasets.facts(data["name"], root, data.get("size"))
    if not options.n and facts.test > DEFAULT_N:
        notes.append(f"n {DEFAULT_N} of {facts.test} test images for each attack (--n to change)")
    if options.attack:
        values["attacks"] = _split(options.attack)
        return notes
    predictors = {catalog.get("defenses", name).predictor for name in defenses}
    fast = norm == "Linf" and facts.classes >= 4 and predictors == {"deterministic"} and not stochastic
    attacks = [entry for entry in DEFAULT_ATTACKS if norm in catalog.get("attacks", entry["name"]).norms]
    attacks.append(AUTOATTACK_FAST if fast else AUTOATTACK)
    if predictors != {"deterministic"}:
        attacks += PROTOCOL_ATTACKS
    if "smoothed" in predictors:
        attacks.append(CERTIFY)
    adaptive = _adaptive(defenses, [entry["name"] for entry in attacks], norm)
    attacks += [{"name": name} for name in adaptive]
    if len(_split(options.eps)) > 1:
        attacks.append({"name": "curve"})
    values["attacks"] = [
        {**entry, "n": options.n or min(entry["n"], facts.test)} if "n" in entry else dict(entry) for entry in attacks
    ]
    names = [label("attacks", entry["name"], entry.get("set", {})) for entry in values["attacks"]]
    numbers = [f" on {counted(entry['n'], 'image')}" if "n" in entry else "" for entry in values["attacks"]]
    chosen = ", ".join(map("".join, zip(names, numbers, strict=True)))
    fewer = {2: "without the DLR loss", 3: "with the untargeted DLR loss"}.get(facts.classes)
    told = [f"AutoAttack for {facts.classes} classes: {fewer}"] if fewer else []
    told += ["AutoAttack: a screen, then all of it on 100 of those that survive"] if fast else []
    told += [f"{name}: adaptive for {', '.join(of)}" for name, of in adaptive.items()]
    return [*notes, f"attacks {chosen}" + (f" ({'; '.join(told)})" if told else "")]


def _adaptive(defenses: list[str], attacks: list[str], norm: str) -> dict[str, list[str]]:
    """For each defense that names attacks adapted to it, of which none is among `attacks`, the first of them that has
    this norm; by attack."""
    found: dict[str, list[str]] = {}
    for defense in defenses:
        named = str(catalog.get("defenses", defense).constant("adaptive_attacks", "")).split(", ")
        usable = [name for name in named if (plugin := catalog.find("attacks", name)) and norm in plugin.norms]
        if usable and not set(named) & set(attacks):
            found.setdefault(usable[0], []).append(defense)
    return found


def place(name: str, root: Path) -> tuple[str, Path]:
    """Name and data root of a data set: `folder:PATH` becomes `folder:NAME`, so that records hold no path.

    A relative PATH in `root` precedes one in the current folder. Raises ValueError for a NAME that is not UTF-8.
    """
    if not name.startswith("folder:"):
        return name, root
    written = Path(name.removeprefix("folder:").strip()).expanduser()
    folder = next((path.resolve() for path in (root / written, written) if path.is_dir()), None)
    if folder is None or written == Path():
        return name, root
    if not _is_utf8(folder.name):
        raise ValueError(f"the name of the image folder {str(folder)!a} is not UTF-8; rename it")
    return f"folder:{folder.name}", folder.parent


def _is_utf8(name: str) -> bool:
    return os.fsencode(name).decode(errors="replace") == name


def _passed_over(name: str, root: Path) -> list[str]:
    """A note on the files of an image folder that are not read."""
    count = folders.find(name, root).passed_over if name.startswith("folder:") else 0
    text = f"{counted(count, 'file')} of {name} passed over: without an image's suffix, or in no class folder"
    return [text] if count else []


def _update(values: dict[str, Any], section: str, **given: Any) -> None:
    """Put the options that were given into a section of the spec."""
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
    entries: list[dict[str, Any]] = []
    for section in ("defenses", "attacks", "models"):
        if values.get(section):
            values[section] = [{"name": e} if isinstance(e, str) else e for e in values[section]]
            entries += values[section]
    if owner not in (catalog.family(entry["name"])[0] for entry in entries):
        kinds = [kind.removesuffix("s") for kind in catalog.KINDS if owner in catalog.names(kind)]
        known = [entry["name"] for entry in entries]
        hint = f" Add it with --{kinds[0]} {owner}, or leave this out" if kinds else catalog.suggest(owner, known)
        raise LookupError(f"--{target} {assignment}: '{owner}' is not in this run.{hint}")
    given = [value(part) for part in right.split(",")] if target == "grid" else value(right)
    for entry in entries:
        if catalog.family(entry["name"])[0] == owner:
            own = {k: v for k, v in entry.get("set", {}).items() if k != name}
            entry |= {"set": own, target: {**(own if target == "set" else entry.get("grid", {})), name: given}}


def value(text: str) -> Any:
    """true and false are booleans, null is None, [a,b] a list, {a: b} a mapping, whose numbers are read here; other
    numbers stay text and are read by the setting's type."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    if text == "null":
        return None
    if text.startswith("[") and text.endswith("]"):
        # --grid has commas between its values, so that a list there needs another separator
        return [value(part) for part in text[1:-1].split(";" if ";" in text else ",") if part.strip()]
    if text.startswith("{") and text.endswith("}"):
        pairs = [part.partition(":") for part in text[1:-1].split(",") if part.strip()]
        if all(colon for _, colon, _ in pairs):
            return {name.strip(): _number(found) for name, _, found in pairs}
    return text


def _number(text: str) -> Any:
    """A value of a mapping, whose settings declare no type for each name."""
    for read_as in (int, float):
        with contextlib.suppress(ValueError):
            return read_as(text)
    return value(text)
