"""Finds plug-ins by name and validates their settings, without importing them (see `plugin_source`)."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bench import models
from bench.core.epsilon import Epsilon, underflows
from bench.planning.plugin_source import REQUIRED, ROOT, Kind, PluginSource, kind_of

if TYPE_CHECKING:  # many commands read what plug-ins declare, few check settings
    from pydantic import BaseModel, TypeAdapter, ValidationError, ValidationInfo

__all__ = ["KINDS", "ROOT", "Kind", "Plugin", "built_in", "describe", "find", "get", "names", "plugin_file", "suggest"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PACKAGES = {"defenses": "defenses", "attacks": "attacks", "models": "bench.models"}
NORMS = ("Linf", "L2", "L1")


class Plugin(PluginSource):
    """A defense, an attack or an architecture: what its file declares, with the rules for its settings.

    The properties are class constants of `Defense` and `Evaluation`, which explain them.
    """

    def constant(self, name: str, default: Any) -> Any:
        """A class constant, or the base class's `default`."""
        return self.constants.get(name, default)

    @property
    def revision(self) -> int:
        """Raised by the author when results change; part of every key."""
        return int(self.constant("revision", 1))

    @property
    def uses_threat(self) -> bool:
        """False where norm and eps play no part in it."""
        return bool(self.constant("uses_threat", True))

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that it supports: all of them where it uses no threat."""
        return tuple(self.constant("norms", NORMS)) if self.uses_threat else NORMS

    @property
    def predictor(self) -> str:
        """The kind of model that a defense gives: deterministic, randomised or smoothed."""
        return str(self.constant("predictor", "deterministic"))

    @property
    def needs_images(self) -> bool:
        """True for an attack that uses adversarial images made by other evaluations."""
        return bool(self.constant("needs_images", False))

    @property
    def predictors(self) -> tuple[str, ...]:
        """The kinds of models that an attack applies to."""
        if self.constant("needs_smoothed", False):
            return ("smoothed",)
        if self.constant("needs_determinism", False):
            return ("deterministic",)
        stochastic = ("randomised", "smoothed")
        return stochastic if self.constant("needs_draws", False) else ("deterministic", *stochastic)

    def resolve(self, values: dict[str, Any], where: str = "") -> dict[str, Any]:
        """All settings with defaults filled in, validated. Raises LookupError or ValueError in one line.

        `preset` names a set of values in the constant `presets`; values given beside it take precedence. So that older
        records keep their keys, a setting in `settings_added_later` is left out while it has its default, and a setting
        in `retired_settings` is filled in with the value declared there, though it can no longer be set.
        """
        from pydantic import ValidationError

        values = self._with_preset(values, where)
        self._check_names(values, where)
        if self.kind != "models" and isinstance(values.get("base"), str):
            values = {**values, "base": {"name": values["base"]}}  # the short form
        choices = {field.name: get_args(field.type) for field in self.fields}
        # YAML and the command line read `label: true` as a boolean, also where the word is one of the choices
        values = {k: "true" if v is True and "true" in choices[k] else v for k, v in values.items()}
        try:
            # pydantic converts each value to its type, so that 6 and 6.0 give one key
            validated = dict(_model(self).validate_python(values))
        except ValidationError as error:
            raise ValueError(where + describe(error, self.name)) from None
        later, found = self.constant("settings_added_later", ()), dict[str, Any]()
        for field in self.fields:
            value = _plain(validated[field.name])
            if field.name not in later or value != field.default:
                found[field.name] = value
        found |= {k: v for k, v in self.constant("retired_settings", {}).items() if k not in later}
        if self.kind != "models" and isinstance(found.get("base"), dict):
            found["base"] = self._resolve_base(found["base"], where)
        return found

    def _with_preset(self, values: dict[str, Any], where: str) -> dict[str, Any]:
        presets = self.constant("presets", {})
        if not presets or "preset" not in values:
            return values
        chosen = str(values["preset"])
        if chosen not in presets:
            hint = f"{suggest(chosen, [*presets])} Known: {', '.join(presets)}"
            raise LookupError(f"{where}{self.name} has no preset '{chosen}'.{hint}")
        return {**presets[chosen], **{k: v for k, v in values.items() if k != "preset"}}

    def _check_names(self, values: dict[str, Any], where: str) -> None:
        known = [field.name for field in self.fields]
        for name in values:
            if name in self.constant("retired_settings", {}):
                raise LookupError(f"{where}{self._retirement(name)}")
            if name not in known:
                listing = ", ".join(known) or "none"
                raise LookupError(f"{where}{self.name} has no setting '{name}'.{suggest(name, known)} Known: {listing}")

    def _retirement(self, name: str) -> str:
        return f"{self.name}.{name} was removed; its results are in {self.constant('retired_results', 'docs/')}"

    def current(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A job's settings as a spec would give them: without the retired ones, those of `base` too, and without the
        revision of `base`. `resolve` gives the same settings back.

        Raises LookupError where a retired setting has another value than the one that the plug-in still computes: such
        a job can be read, but neither run nor evaluated again.
        """
        retired = self.constant("retired_settings", {})
        for name, value in settings.items():
            if name in retired and value != retired[name]:
                raise LookupError(f"{self._retirement(name)}; a model with {name}={value} cannot be built again")
        found = {name: value for name, value in settings.items() if name not in retired}
        if self.kind != "models" and isinstance(base := found.get("base"), dict):
            inner = get(self.kind, base["name"]).current(base.get("set", {}))
            found["base"] = {"name": base["name"], "set": inner}
        return found

    def _resolve_base(self, entry: dict[str, Any], where: str) -> dict[str, Any]:
        """The plug-in that the setting `base` names, with its own defaults and revision, as both change the result."""
        name, settings = entry.get("name"), entry.get("set", {})
        if set(entry) - {"name", "set"} or not isinstance(name, str) or not isinstance(settings, dict):
            raise ValueError(f"{where}{self.name}.base: expected {{name: ..., set: {{...}}}}, got {entry}")
        if name == self.name:
            raise ValueError(f"{where}{self.name}.base: '{name}' cannot be its own base")
        base = get(self.kind, name)
        return {"name": name, "set": base.resolve(settings, f"{where}{self.name}.base: "), "revision": base.revision}


def _plain(value: Any) -> Any:
    """A validated value as JSON; an eps as text, which is exact."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Epsilon) else value


@functools.cache
def _model(plugin: Plugin) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter, create_model, field_validator

    fields: dict[str, Any] = {f.name: (f.type, ... if f.default is REQUIRED else f.default) for f in plugin.fields}
    config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())
    checks: dict[str, Any] = {"check_numbers": field_validator("*", mode="before")(classmethod(check_numbers))}
    return TypeAdapter(create_model(plugin.name, __config__=config, __validators__=checks, **fields))


def check_numbers(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """A value, or a list of values, of a field as it is. Raises ValueError for what pydantic reads as another number:
    true as 1, and 1e-400 as 0."""
    expected = str(cls.model_fields[str(info.field_name)].annotation)
    if re.search(r"\b(int|float)\b", expected) and "bool" not in expected:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool):
                raise ValueError("expected a number, not true or false")
            if isinstance(each, str) and underflows(each.strip()):
                raise ValueError("too small: it is zero as a float")
    return value


def describe(error: ValidationError, owner: str) -> str:
    """The first problem of a pydantic error as one line: the setting, the problem, the value."""
    first = error.errors()[0]
    # pydantic also names the member of a union, which means nothing to the author of the value
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
    found = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{owner}.{name}: {message[:1].lower()}{message[1:]}{found}" if name else f"{owner}: {message}"


def suggest(name: str, known: list[str]) -> str:
    """' Did you mean ...?' if a known name is similar, else nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def family(name: str) -> tuple[str, dict[str, Any]]:
    """The plug-in that stands for a package and its setting `name`: `timm:resnet18` is timm with name=resnet18."""
    plugin, colon, own = name.partition(":")
    return plugin, {"name": own} if colon else {}


def names(kind: Kind) -> list[str]:
    """Every plug-in of a kind, by file name, sorted."""
    return sorted(files(kind))


@functools.cache
def get(kind: Kind, name: str) -> Plugin:
    """The plug-in of this name. Raises LookupError with the nearest names, ValueError if its file is broken."""
    found = files(kind)
    if name not in found:
        known = sorted(found)
        raise LookupError(f"no {kind[:-1]} '{name}'.{suggest(name, known)} Known: {', '.join(known)}")
    return Plugin.read(kind, found[name])


def find(kind: Kind, name: str) -> Plugin | None:
    """The plug-in of this name; None if its file is missing or broken, since records outlive plug-ins."""
    try:
        return get(kind, name)
    except (LookupError, ValueError):
        return None


def built_in(kind: Kind) -> Path:
    """The folder of the plug-ins that come with bench, found relative to bench's own files: a package `attacks` in the
    working folder or earlier on `sys.path` replaces none of them."""
    return ROOT.joinpath(*PACKAGES[kind].split("."))


def files(kind: Kind) -> dict[str, Path]:
    """Every plug-in file of a kind by name: those of the built-in folder, then those named by BENCH_PLUGINS."""
    if kind == "models":  # `common` holds code that architectures share
        paths = [path for place in models.__path__ for path in Path(place).glob("*.py") if path.stem != "common"]
    else:
        extra = [Path(p) for p in os.environ.get("BENCH_PLUGINS", "").split(os.pathsep) if p]
        paths = [*built_in(kind).glob("*.py"), *(path for path in extra if kind_of(path) == kind)]
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem.startswith("_"):
            continue
        taken = found.setdefault(path.stem, path)
        if taken != path and not taken.samefile(path):
            raise ValueError(f"plug-in {path} has the name of {taken}; rename the file")
    return found


def plugin_file(named: str) -> Path:
    """The file that `--plugin` names: a path, or the name of an entry point of an installed package.

    Packages announce plug-ins under the entry points `bench.defenses` and `bench.attacks`, as `NAME = "module"` or
    `NAME = "module:Class"`. Only a named one is used, and none is imported here. Raises FileNotFoundError or ValueError
    in one line.
    """
    path = Path(named)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    from importlib import metadata  # slow to import, and few commands name an entry point

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
