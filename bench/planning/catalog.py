"""What each plug-in file declares, read from its source by `ast`: no import, no torch, a broken file hurts only itself.

The file name is the name: `defenses/trades.py` holds exactly one subclass and `trades` finds it. Fields, defaults and
class constants must be literals, so that the planner can check a spec and make content keys without running anything.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import annotated_types

from bench import models
from bench.core.epsilon import Epsilon

if TYPE_CHECKING:  # many commands read what plug-ins declare, few check settings
    from pydantic import TypeAdapter, ValidationError

Kind = Literal["defenses", "attacks", "models"]
KINDS: tuple[Kind, ...] = ("defenses", "attacks", "models")
PACKAGES = {"defenses": "defenses", "attacks": "attacks", "models": "bench.models"}
ROOT = Path(__file__).parents[2]  # the folder that holds bench, attacks and defenses, in a checkout and in a wheel
REQUIRED = object()
ROOTS: dict[str, Kind] = {"Defense": "defenses", "Attack": "attacks", "Evaluation": "attacks"}
_BOUNDS = ("Gt", "Ge", "Lt", "Le")
# what an annotation may be made of; powers and products, say, could keep the planner busy for ever
_TYPE_PARTS = (
    *(ast.Name, ast.Subscript, ast.Tuple, ast.Constant, ast.BinOp, ast.BitOr),
    *(ast.UnaryOp, ast.USub, ast.List, ast.keyword, ast.Load),
)
NAMES: dict[str, Any] = {
    **{t.__name__: t for t in (bool, int, float, str, list, tuple, dict)},
    **{name: getattr(annotated_types, name) for name in _BOUNDS},
    **{"Any": Any, "Literal": Literal, "Annotated": Annotated, "Epsilon": Epsilon, "None": None},
    # aliases of bench.core that plug-ins use in annotations
    "AttackLoss": Literal["ce", "cw", "dlr", "kl"],
    "Start": Literal["uniform", "normal", "zero"],
    "BatchNormMode": Literal["eval", "train", "train_frozen_stats"],
}


@dataclass(frozen=True)
class Field:
    """One setting: its type as a Python object, as written, its default, and what the source says about it."""

    name: str
    type: Any
    written: str
    default: Any
    doc: str


@dataclass(frozen=True, eq=False)
class Plugin:
    """One plug-in file. `formula` is the first docstring line, `source` the next paragraph, `notes` what follows."""

    kind: Kind
    name: str
    path: Path
    formula: str
    source: str
    notes: str
    fields: tuple[Field, ...]
    constants: dict[str, Any]
    sha256: str

    def constant(self, name: str, default: Any) -> Any:
        """A class constant, or the base class's `default`."""
        return self.constants.get(name, default)

    def resolve(self, values: dict[str, Any], where: str = "") -> dict[str, Any]:
        """All settings with defaults filled in, validated. Raises LookupError or ValueError in one line.

        A setting named in the constant `settings_added_later` is left out while it has its default: it is younger than
        the first records, which keep their keys. For the same reason a setting in `retired_settings` is filled in with
        the value declared there, though it can no longer be set. `preset` names a set of values in the constant
        `presets`; values given beside it take precedence.
        """
        presets = self.constant("presets", {})
        if presets and "preset" in values:
            chosen = str(values["preset"])
            if chosen not in presets:
                hint = f"{suggest(chosen, [*presets])} Known: {', '.join(presets)}"
                raise LookupError(f"{where}{self.name} has no preset '{chosen}'.{hint}")
            values = {**presets[chosen], **{k: v for k, v in values.items() if k != "preset"}}
        known = [field.name for field in self.fields]
        retired = self.constant("retired_settings", {})
        for name in values:
            if name in retired:
                raise LookupError(f"{where}{self.retirement(name)}")
            if name not in known:
                listing = ", ".join(known) or "none"
                raise LookupError(f"{where}{self.name} has no setting '{name}'.{suggest(name, known)} Known: {listing}")
        if self.kind != "models" and isinstance(values.get("base"), str):
            values = {**values, "base": {"name": values["base"]}}  # the short form
        from pydantic import ValidationError

        words = {field.name: get_args(field.type) for field in self.fields}
        # YAML and the command line read `label: true` as a boolean; where the word is one of the choices it is meant
        values = {k: "true" if v is True and "true" in words[k] else v for k, v in values.items()}
        try:
            # through JSON-like values, so that 6 and 6.0 resolve alike and make one key
            resolved = _model(self).validate_python(values)
        except ValidationError as error:
            raise ValueError(where + describe(error, self.name)) from None
        found: dict[str, Any] = {name: _plain(v) for name, v in dict(resolved).items()}
        later = self.constant("settings_added_later", ())
        young = {f.name: f.default for f in self.fields if f.name in later}
        found = {name: value for name, value in found.items() if name not in young or value != young[name]}
        found |= {name: value for name, value in retired.items() if name not in later}
        base = found.get("base") if self.kind != "models" else None
        return {**found, "base": self._base(base, where)} if isinstance(base, dict) else found

    def retirement(self, name: str) -> str:
        """The one line for a setting that was removed: that it was, and where its results are."""
        return f"{self.name}.{name} was removed; its results are in {self.constant('retired_results', 'docs/')}"

    def current(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A job's settings without the retired ones. Raises LookupError where one has another value than the one that
        the plug-in still computes: such a job can be read, but neither run nor evaluated again."""
        retired = self.constant("retired_settings", {})
        for name, value in settings.items():
            if name in retired and value != retired[name]:
                raise LookupError(f"{self.retirement(name)}; a model with {name}={value} cannot be built again")
        return {name: value for name, value in settings.items() if name not in retired}

    def _base(self, entry: dict[str, Any], where: str) -> dict[str, Any]:
        """What a setting `base` names, with its own defaults and revision, as both change the result."""
        name, settings = entry.get("name"), entry.get("set", {})
        if set(entry) - {"name", "set"} or not isinstance(name, str) or not isinstance(settings, dict):
            raise ValueError(f"{where}{self.name}.base: expected {{name: ..., set: {{...}}}}, got {entry}")
        if name == self.name:
            raise ValueError(f"{where}{self.name}.base: '{name}' cannot be its own base")
        base = get(self.kind, name)
        revision = base.constant("revision", 1)
        return {"name": name, "set": base.resolve(settings, f"{where}{self.name}.base: "), "revision": revision}


def _plain(value: Any) -> Any:
    """Numbers as text, which is exact."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Epsilon) else value


def describe(error: ValidationError, owner: str) -> str:
    """The first problem of a pydantic error as one line: which setting, what is wrong, what was found."""
    first = error.errors()[0]
    # pydantic names the member of a union too, which says nothing to who wrote the value
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
    found = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{owner}.{name}: {message[:1].lower()}{message[1:]}{found}" if name else f"{owner}: {message}"


def suggest(name: str, known: list[str]) -> str:
    """' Did you mean ...?' where something known is near, else nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def names(kind: Kind) -> list[str]:
    """Every plug-in of a kind, by file name, sorted."""
    return sorted(_files(kind))


@functools.cache
def get(kind: Kind, name: str) -> Plugin:
    """What the file of this name declares. Raises LookupError with the nearest names, ValueError if it is broken."""
    files = _files(kind)
    if name not in files:
        known = sorted(files)
        raise LookupError(f"no {kind[:-1]} '{name}'.{suggest(name, known)} Known: {', '.join(known)}")
    return _read(kind, name, files[name])


def search_path(kind: Kind) -> list[Path]:
    """Folders and files that hold plug-ins of a kind: the built-in folder, then what `--plugin` (BENCH_PLUGINS) names.

    Built-in plug-ins are found relative to bench's own files: a package `attacks` in the working folder or earlier on
    `sys.path` replaces none of them.
    """
    extra = [Path(p) for p in os.environ.get("BENCH_PLUGINS", "").split(os.pathsep) if p]
    if kind == "models":  # a package inside bench: no folder of the user's can take its place
        return [Path(place) for place in models.__path__]
    return [built_in(kind), *(p for p in extra if _kind_of(p) == kind)]


def built_in(kind: Kind) -> Path:
    """The folder of the plug-ins that come with bench."""
    return ROOT.joinpath(*PACKAGES[kind].split("."))


def plugin_file(named: str) -> Path:
    """The file that `--plugin` names: a path, or the name of an entry point of an installed package.

    Packages announce plug-ins under the entry points `bench.defenses` and `bench.attacks`, as `NAME = "module"` or
    `NAME = "module:Class"`; none is used, nor imported here, before it is named. Raises FileNotFoundError or ValueError
    in one line.
    """
    path = Path(named)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    from importlib import metadata  # it costs every start of the command line, and few name an entry point

    groups = ("bench.defenses", "bench.attacks")
    announced = {point.name: point for group in groups for point in metadata.entry_points(group=group)}
    if named not in announced:
        installed = f"; installed packages announce {', '.join(sorted(announced))}" if announced else ""
        raise FileNotFoundError(
            f"no plug-in file {named}; expected a .py file with one defense or attack, or the name of an entry point "
            f"of the group {' or '.join(groups)}{installed}"
        )
    point = announced[named]
    inside = Path(*point.module.split(".")).with_suffix(".py")
    found = point.dist and Path(str(point.dist.locate_file(inside)))
    if not found or not found.is_file():  # an editable install: Python knows where its packages are
        spec = importlib.util.find_spec(point.module)
        found = Path(spec.origin) if spec and spec.origin else inside
    if found.stem != named:
        raise ValueError(f"entry point {named} leads to {found.name}; expected {named}.py")
    return found.resolve()


def _kind_of(path: Path) -> Kind:
    """A plug-in outside the tree says by its base class what it is. Raises ValueError where it says nothing."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read plug-in {path}: {error}") from None
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            oldest = _lineage(tree, node, path)[0][0]
            for base in oldest.bases:
                if isinstance(base, ast.Name) and base.id in ROOTS:
                    return ROOTS[base.id]
    raise ValueError(f"plug-in {path} holds no class derived from Defense, Attack or Evaluation")


def _files(kind: Kind) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in search_path(kind):
        for path in [place] if place.suffix == ".py" else sorted(place.glob("*.py")):
            # `common` holds what architectures share
            if path.stem.startswith("_") or (kind == "models" and path.stem == "common"):
                continue
            taken = found.setdefault(path.stem, path)
            if taken != path and not taken.samefile(path):
                raise ValueError(f"plug-in {path} has the name of {taken}; rename the file")
    return found


def _read(kind: Kind, name: str, path: Path) -> Plugin:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
    except SyntaxError as error:
        raise ValueError(f"{kind}/{path.name}, line {error.lineno}: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {kind}/{path.name}: {error}") from None
    paragraphs = [" ".join(p.split()) for p in (ast.get_docstring(tree) or "").split("\n\n")] + ["", ""]
    if kind == "models":
        fields, constants = _of_function(tree, path)
        sources = [source]
    else:
        lineage = _lineage(tree, _plugin_class(tree, path), path)
        fields, constants = _of_classes(lineage)
        sources = [source, *(parent.read_text(encoding="utf-8") for _, parent in reversed(lineage[:-1]))]
    return Plugin(
        kind,
        name,
        path,
        formula=paragraphs[0],
        source=paragraphs[1],
        notes="\n\n".join(paragraphs[2:]).strip(),
        fields=fields,
        constants=constants,
        sha256=hashlib.sha256("".join(sources).encode()).hexdigest(),
    )


def _plugin_class(tree: ast.Module, path: Path) -> ast.ClassDef:
    """The one public dataclass with bases in a plug-in file."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.bases and not n.name.startswith("_")]
    plugin = [c for c in classes if _is_dataclass(c)]
    if len(plugin) != 1:
        raise ValueError(f"{path.parent.name}/{path.name} must hold one @dataclass plug-in, found {len(plugin)}")
    return plugin[0]


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(isinstance(decorator, (ast.Name, ast.Call)) for decorator in node.decorator_list)


def _lineage(tree: ast.Module, node: ast.ClassDef, path: Path) -> list[tuple[ast.ClassDef, Path]]:
    """A class and the dataclasses that it extends, oldest first, with their files.

    Followed are names imported by `from ... import` out of bench, defenses or attacks; the roots Defense, Attack and
    Evaluation are not part of it: their constants are the defaults of `Plugin.constant`.
    """
    wanted = {base.id for base in node.bases if isinstance(base, ast.Name)} - ROOTS.keys()
    for line in tree.body:
        if not isinstance(line, ast.ImportFrom) or not wanted & {alias.name for alias in line.names}:
            continue
        file = ROOT.joinpath(*(line.module or "").split(".")).with_suffix(".py")
        if file.is_file():
            parent = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
            for base in parent.body:
                if isinstance(base, ast.ClassDef) and base.name in wanted and _is_dataclass(base):
                    return [*_lineage(parent, base, file), (node, path)]
    return [(node, path)]


def _of_classes(lineage: list[tuple[ast.ClassDef, Path]]) -> tuple[tuple[Field, ...], dict[str, Any]]:
    """Fields and constants of a plug-in, in the order of a dataclass: those of its base first, overridden in place."""
    fields, constants = dict[str, Field](), dict[str, Any]()
    for owner, path in lineage:
        for node, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            name, written = node.target.id, ast.unparse(node.annotation)
            if written.startswith("ClassVar"):
                constants[name] = _literal(node.value, path)
                continue
            doc = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            default = REQUIRED if node.value is None else _default(node.value, path)
            fields[name] = Field(name, _type(node.annotation, path), written, default, " ".join(str(doc).split()))
    return tuple(fields.values()), constants


def _of_function(tree: ast.Module, path: Path) -> tuple[tuple[Field, ...], dict[str, Any]]:
    """Keyword-only settings of an architecture's `build`."""
    builds = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "build"]
    if len(builds) != 1:
        raise ValueError(f"bench/models/{path.name} must define exactly one function build")
    arguments = builds[0].args
    fields = [
        Field(a.arg, _type(a.annotation, path), ast.unparse(a.annotation), _literal(default, path), "")
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if a.annotation is not None
    ]
    constants = {
        node.targets[0].id: _literal(node.value, path)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "revision"
    }
    return tuple(fields), constants


def _literal(node: ast.expr | None, path: Path) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except (ValueError, TypeError):
        place = f"{path.parent.name}/{path.name}, line {getattr(node, 'lineno', '?')}"
        raise ValueError(f"{place}: constants and defaults must be literals") from None


def _default(node: ast.expr, path: Path) -> Any:
    """A literal, or field(default_factory=list|dict|lambda: <literal>) for mutable ones."""
    if isinstance(node, ast.Call) and node.keywords and node.keywords[0].arg == "default_factory":
        factory = node.keywords[0].value
        if isinstance(factory, ast.Lambda):
            return _literal(factory.body, path)
        if ast.unparse(factory) in ("list", "dict"):
            return [] if ast.unparse(factory) == "list" else {}
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Epsilon" and len(node.args) == 1:
        return str(Epsilon(_literal(node.args[0], path)))
    return _literal(node, path)


def _type(node: ast.expr | None, path: Path) -> Any:
    """The annotation as a type, from a fixed vocabulary; unknown names are refused."""
    assert node is not None
    place = f"{path.parent.name}/{path.name}, line {getattr(node, 'lineno', '?')}"
    for part in ast.walk(node):
        bound = isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in _BOUNDS
        if not (bound or isinstance(part, _TYPE_PARTS)):
            raise ValueError(f"{place}: cannot read the type '{ast.unparse(node)}'")
        if isinstance(part, ast.Name) and part.id not in NAMES:
            raise ValueError(f"{place}: unknown type '{part.id}'; use {', '.join(NAMES)}")
    try:
        # only names of NAMES, subscripts, unions, literals and bounds are left
        return eval(compile(ast.Expression(node), str(path), "eval"), {"__builtins__": {}}, dict(NAMES))  # noqa: S307
    except TypeError as error:
        raise ValueError(f"{place}: cannot read the type '{ast.unparse(node)}': {error}") from None


@functools.cache
def _model(plugin: Plugin) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter, create_model

    fields: dict[str, Any] = {f.name: (f.type, ... if f.default is REQUIRED else f.default) for f in plugin.fields}
    config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())
    return TypeAdapter(create_model(plugin.name, __config__=config, **fields))
