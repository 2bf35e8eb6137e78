"""The settings of a defense that a search varies, within the bounds that its file declares. Reads plug-ins by `ast`."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from bench.planning.catalog import Plugin, suggest
from bench.planning.plugin_source import Field

DIGITS = 4  # of a number that is searched, so that it can be typed as a table shows it
INSIDE = 1e-3  # share of the range by which a declared end is kept away from that is itself excluded


@dataclass(frozen=True)
class Dimension:
    """A setting that is searched: one of `choices`, or else a number from `low` to `high`, both included, `whole` or
    not, evenly on its scale or on that of its logarithm (`log`)."""

    name: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """`sigma from 0.05 to 1.5 (log)`, `target one of logits, softmax`."""
        if self.choices:
            return f"{self.name} one of {', '.join(map(typed, self.choices))}"
        return f"{self.name} from {typed(self.low)} to {typed(self.high)}" + " (log)" * self.log

    def holds(self, value: Any) -> bool:
        """Is this value one of those searched?"""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def rounded(self, value: Any) -> Any:
        """The value as it is trained and shown: with more digits where the range is narrow."""
        if self.choices or self.whole:
            return value
        digits = DIGITS + int(math.log10(max(abs(self.low), abs(self.high)) / (self.high - self.low) + 1))
        return min(max(float(f"{value:.{digits}g}"), self.low), self.high)


@dataclass(frozen=True)
class _Declared:
    """What a type allows: `choices`, or numbers from `low` to `high`; the ends named in `open` are excluded."""

    whole: bool = False
    low: float = -math.inf
    high: float = math.inf
    open: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """`above 0 and at most 1`."""
        ends = [f"{'above' if 'low' in self.open else 'at least'} {typed(self.low)}"] * math.isfinite(self.low)
        ends += [f"{'below' if 'high' in self.open else 'at most'} {typed(self.high)}"] * math.isfinite(self.high)
        return " and ".join(ends) or "without bounds"

    def ends(self) -> tuple[float, float]:
        """The bounds of a search over all of it."""
        margin = INSIDE * (self.high - self.low)
        low, high = self.low + margin * ("low" in self.open), self.high - margin * ("high" in self.open)
        return (math.ceil(low), math.floor(high)) if self.whole else (low, high)

    def outside(self, value: float) -> bool:
        """Is the value none that may be set?"""
        below = value <= self.low if "low" in self.open else value < self.low
        return below or (value >= self.high if "high" in self.open else value > self.high)


def dimensions(plugin: Plugin, texts: list[str]) -> list[Dimension]:
    """What each `--search` asks for: `sigma=0.05:1.5:log`, `target=logits,softmax`, `kappa`.

    A name alone stands for all that its file declares: every choice, or both bounds. Raises LookupError for an unknown
    setting, ValueError for bounds outside of those declared; both in one line.
    """
    found = [_dimension(plugin, text) for text in texts]
    names = [each.name for each in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--search names {twice[0]} twice; expected each setting once")
    if not found:
        able = [(each.name, _declared(each.type)) for each in plugin.fields]
        told = [f"{name} ({', '.join(map(typed, d.choices)) or d})" for name, d in able if d is not None]
        listed = f"settings of {plugin.name}: {', '.join(told)}" if told else f"{plugin.name} has no setting to search"
        raise ValueError(f"--optuna needs --search, such as NAME=LOW:HIGH; {listed}")
    return found


def _dimension(plugin: Plugin, text: str) -> Dimension:
    name, equals, right = text.partition("=")
    name = name.strip().removeprefix(f"{plugin.name}.")
    fields: dict[str, Field] = {field.name: field for field in plugin.fields}
    if name not in fields:
        hint = f"{suggest(name, [*fields])} Known: {', '.join(fields) or 'none'}"
        raise LookupError(f"--search {text}: {plugin.name} has no setting '{name}'.{hint}")
    declared = _declared(fields[name].type)
    if declared is None:
        kind = fields[name].written
        raise ValueError(f"--search {text}: {name} is {kind}; a search varies numbers, true and false, named choices")
    if declared.choices:
        return Dimension(name, choices=_chosen(text, declared.choices, right) if equals else declared.choices)
    if not equals:
        low, high = declared.ends()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"--search {text}: {plugin.name} declares {name} {declared}, not both bounds; "
                f"give them as {name}=LOW:HIGH"
            )
        return Dimension(name, low, high, declared.whole)
    return _range(plugin.name, name, text, right, declared)


def _chosen(text: str, choices: tuple[Any, ...], right: str) -> tuple[Any, ...]:
    known = {typed(choice): choice for choice in choices}
    words = list(dict.fromkeys(word.strip() for word in right.split(",") if word.strip()))
    unknown = [word for word in words if word not in known]
    if unknown or len(words) < 2:
        found = f"'{unknown[0]}' is none of its choices" if unknown else "fewer than two choices"
        raise ValueError(f"--search {text}: {found}; expected some of {', '.join(known)}")
    return tuple(known[word] for word in words)


def _range(plugin: str, name: str, text: str, right: str, declared: _Declared) -> Dimension:
    parts = [part.strip() for part in right.split(":")]
    log = len(parts) == 3 and parts[2] == "log"
    if len(parts) != 2 + log:
        raise ValueError(f"--search {text}: expected two bounds, as in {name}=LOW:HIGH or {name}=LOW:HIGH:log")
    low, high = (_number(text, part, declared.whole) for part in parts[:2])
    for end, value in (("low", low), ("high", high)):
        if declared.outside(value):
            raise ValueError(f"--search {text}: {end} is {typed(value)}, but {plugin} declares {name} {declared}")
    if low >= high:
        raise ValueError(f"--search {text}: low is {typed(low)}, high is {typed(high)}; expected low below high")
    if log and low <= 0:
        raise ValueError(f"--search {text}: low is {typed(low)}; a log scale needs one above 0")
    return Dimension(name, low, high, declared.whole, log)


def _number(text: str, word: str, whole: bool) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (whole and value != int(value)):
        raise ValueError(f"--search {text}: '{word}' is no {'whole ' * whole}number")
    return int(value) if whole else value


def _declared(kind: Any) -> _Declared | None:
    """What a setting's type allows; None for a type that no search varies."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        members = [member for member in inside if member is not type(None)]
        return _declared(members[0]) if len(members) == 1 else None
    if origin is Literal:
        return _Declared(choices=inside) if len(inside) > 1 else None
    if kind is bool:
        return _Declared(choices=(False, True))
    if origin is not Annotated:
        return _Declared(whole=kind is int) if kind in (int, float) else None
    inner = _declared(inside[0])
    if inner is None or inner.choices:
        return inner
    low, high, excluded = inner.low, inner.high, inner.open
    for bound in inside[1:]:
        if isinstance(bound, (Gt, Ge)):
            low = float(bound.gt if isinstance(bound, Gt) else bound.ge)  # type: ignore[arg-type]
            excluded += ("low",) * isinstance(bound, Gt)
        elif isinstance(bound, (Lt, Le)):
            high = float(bound.lt if isinstance(bound, Lt) else bound.le)  # type: ignore[arg-type]
            excluded += ("high",) * isinstance(bound, Lt)
    return _Declared(inner.whole, low, high, excluded)


def typed(value: Any) -> str:
    """The value as it is typed on the command line."""
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}" if value == float(f"{value:.{DIGITS}g}") else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
