"""Reads the source of a plug-in file with `ast`. Nothing is imported, so this needs no torch and a broken file breaks
only itself.

`defenses/trades.py` holds exactly one dataclass, and its file name is its name. Defaults and class constants must be
literals, so that a spec can be checked and keys can be computed without running a plug-in.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import annotated_types

from bench.core.epsilon import Epsilon

Kind = Literal["defenses", "attacks", "models"]
ROOT = Path(__file__).parents[2]  # the folder that holds bench, attacks and defenses, in a checkout and in a wheel
REQUIRED = object()  # the default of a setting that has none
# the base classes of plug-ins; their constants are the defaults of `Plugin.constant`
ROOTS: dict[str, Kind] = {"Defense": "defenses", "Attack": "attacks", "Evaluation": "attacks"}
_BOUNDS = ("Gt", "Ge", "Lt", "Le")
# the syntax that an annotation may use; evaluating a power, say, could take for ever
_TYPE_SYNTAX = (
    *(ast.Name, ast.Subscript, ast.Tuple, ast.Constant, ast.BinOp, ast.BitOr),
    *(ast.UnaryOp, ast.USub, ast.List, ast.keyword, ast.Load),
)
TYPES: dict[str, Any] = {
    **{t.__name__: t for t in (bool, int, float, str, list, tuple, dict)},
    **{name: getattr(annotated_types, name) for name in _BOUNDS},
    **{"Any": Any, "Literal": Literal, "Annotated": Annotated, "Epsilon": Epsilon, "None": None},
    # aliases of bench.core and bench.models that plug-ins use in annotations
    "AttackLoss": Literal["ce", "cw", "dlr", "kl"],
    "Start": Literal["uniform", "normal", "zero"],
    "BatchNormMode": Literal["eval", "train", "train_frozen_stats"],
    "Activation": Literal["relu", "silu", "gelu", "softplus"],
}
Fields = tuple["Field", ...]
Constants = dict[str, Any]


class MistakeError(ValueError):
    """A mistake in a plug-in's file, as one line that begins with its place."""

    @classmethod
    def at(cls, path: Path, line: int, text: str) -> Self:
        """The error of a mistake in this line of a file."""
        return cls(f"{place_of(path, line)}: {text}")


def place_of(path: Path, line: int) -> str:
    """`defenses/mine.py:31`; a message holds no folder of the user's."""
    return f"{path.parent.name}/{path.name}:{line}"


@dataclass(frozen=True)
class Field:
    """One setting: its type as a Python object, as written, its default, and its documentation."""

    name: str
    type: Any
    written: str
    default: Any
    doc: str


@dataclass(frozen=True, eq=False)
class PluginSource:
    """One plug-in file. `formula` is the first docstring line, `source` the next paragraph, `notes` the rest."""

    kind: Kind
    name: str
    path: Path
    formula: str
    source: str
    notes: str
    fields: Fields
    constants: Constants
    sha256: str

    @classmethod
    def read(cls, kind: Kind, path: Path) -> Self:
        """The plug-in in this file. Raises ValueError in one line for a file that cannot be read."""
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text, filename=str(path))
        except SyntaxError as error:
            raise MistakeError.at(path, error.lineno or 1, error.msg) from None
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {kind}/{path.name}: {error}") from None
        paragraphs = [" ".join(p.split()) for p in (ast.get_docstring(tree) or "").split("\n\n")] + ["", ""]
        if kind == "models":
            fields, constants = _of_build_function(tree, path)
        else:
            lineage = _lineage(tree, _plugin_class(tree, path), path)
            fields, constants = _of_classes(lineage)
            text += "".join(parent.read_text(encoding="utf-8") for _, parent in reversed(lineage[:-1]))
        return cls(
            kind,
            path.stem,
            path,
            formula=paragraphs[0],
            source=paragraphs[1],
            notes="\n\n".join(paragraphs[2:]).strip(),
            fields=fields,
            constants=constants,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )

    def mistake(self, name: str, text: str) -> MistakeError:
        """The error of a mistake at the first line that sets `name`, or at the docstring if that is empty."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if name else []
        found = (number for number, line in enumerate(lines, 1) if re.match(rf"\s+{name}\b", line))
        return MistakeError.at(self.path, next(found, 1), f"{text}")


def kind_of(path: Path) -> Kind:
    """The kind of a plug-in outside the built-in folders, from its base class. Raises ValueError if it has none."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise MistakeError.at(path, error.lineno or 1, error.msg) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read plug-in {path}: {error}") from None
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            oldest = _lineage(tree, node, path)[0][0]
            for name in _base_names(oldest) & ROOTS.keys():
                return ROOTS[name]
    raise ValueError(f"plug-in {path} holds no class derived from Defense, Attack or Evaluation")


def _plugin_class(tree: ast.Module, path: Path) -> ast.ClassDef:
    """The one public dataclass with a base class in a plug-in file."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.bases and not n.name.startswith("_")]
    found = [node for node in classes if _is_dataclass(node)]
    if not found and len(classes) == 1:
        raise MistakeError.at(path, classes[0].lineno, f"class {classes[0].name} needs the decorator @dataclass")
    if len(found) != 1:
        line = found[1].lineno if found else 1
        raise MistakeError.at(path, line, f"expected one @dataclass plug-in in the file, found {len(found)}")
    for node in found[0].body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            advice = "declare settings as fields, and put what follows from them into __post_init__"
            raise MistakeError.at(path, node.lineno, f"a plug-in is a dataclass without __init__; {advice}")
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            raise MistakeError.at(
                path,
                node.lineno,
                f"'{name}' has no type; write {name}: ClassVar[...] = ... for a constant, or "
                f"{name}: float = ... for a setting",
            )
    return found[0]


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(isinstance(decorator, (ast.Name, ast.Call)) for decorator in node.decorator_list)


def _base_names(node: ast.ClassDef) -> set[str]:
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def _lineage(tree: ast.Module, node: ast.ClassDef, path: Path) -> list[tuple[ast.ClassDef, Path]]:
    """A class and the dataclasses that it extends, oldest first, with their files.

    Only names imported by `from ... import` out of bench, defenses or attacks are followed, and the classes in `ROOTS`
    are not part of it.
    """
    wanted = _base_names(node) - ROOTS.keys()
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


def _of_classes(lineage: list[tuple[ast.ClassDef, Path]]) -> tuple[Fields, Constants]:
    """Fields and constants in the order of a dataclass: those of a base class first, overridden in place."""
    fields, constants = dict[str, Field](), Constants()
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


def _of_build_function(tree: ast.Module, path: Path) -> tuple[Fields, Constants]:
    """The keyword-only arguments of an architecture's `build`, its revision and the settings added later."""
    builds = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "build"]
    if len(builds) != 1:
        raise ValueError(f"bench/models/{path.name} must define exactly one function build")
    arguments = builds[0].args
    fields = [
        Field(a.arg, _type(a.annotation, path), ast.unparse(a.annotation), _literal(default, path), "")
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if a.annotation is not None
    ]
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    declared = [name for name in ("revision", "settings_added_later") if name in assigned]
    return tuple(fields), {name: _literal(assigned[name], path) for name in declared}


def _literal(node: ast.expr | None, path: Path) -> Any:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise MistakeError.at(path, node.lineno, "constants and defaults must be literals") from None


def _default(node: ast.expr, path: Path) -> Any:
    """A literal, or field(default_factory=list|dict|lambda: <literal>) for mutable ones."""
    if isinstance(node, ast.Call) and node.keywords and node.keywords[0].arg == "default_factory":
        factory = node.keywords[0].value
        if isinstance(factory, ast.Lambda):
            return _literal(factory.body, path)
        if ast.unparse(factory) in ("list", "dict"):
            return [] if ast.unparse(factory) == "list" else {}
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Epsilon" and len(node.args) == 1:
        written = _literal(node.args[0], path)
        try:
            return str(Epsilon(written))
        except ValueError as error:
            raise MistakeError.at(path, node.lineno, str(error)) from None
    return _literal(node, path)


def _type(node: ast.expr | None, path: Path) -> Any:
    """The type that an annotation names. Raises ValueError for anything but types in `TYPES` and their bounds."""
    assert node is not None
    for part in ast.walk(node):
        bound = isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in _BOUNDS
        if not (bound or isinstance(part, _TYPE_SYNTAX)):
            raise MistakeError.at(path, node.lineno, f"cannot read the type '{ast.unparse(node)}'")
        if isinstance(part, ast.Name) and part.id not in TYPES:
            raise MistakeError.at(path, node.lineno, f"unknown type '{part.id}'; use {', '.join(TYPES)}")
    try:
        # safe: the loop above leaves only names of TYPES, subscripts, unions, literals and bounds
        return eval(compile(ast.Expression(node), str(path), "eval"), {"__builtins__": {}}, dict(TYPES))  # noqa: S307
    except TypeError as error:
        raise MistakeError.at(path, node.lineno, f"cannot read the type '{ast.unparse(node)}': {error}") from None
