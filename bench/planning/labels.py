"""Short display names: what tells two jobs apart, and nothing else."""

from __future__ import annotations

from typing import Any

from bench.planning import catalog


def label(kind: catalog.Kind, name: str, settings: dict[str, Any]) -> str:
    """`pgd (loss=cw, steps=40)`: the name and the settings that differ from the plug-in's defaults.

    All settings where the plug-in file is gone. A base is always named, with its own settings: `awp (base=trades)`.
    """
    try:
        defaults = catalog.get(kind, name).resolve({})
    except (LookupError, ValueError):
        defaults = {}
    own = {k: v for k, v in settings.items() if k == "base" or k not in defaults or defaults[k] != v}
    text = ", ".join(f"{k}={_short(kind, v)}" for k, v in sorted(own.items()))
    return f"{name} ({text})" if text else name


def defense_label(what: dict[str, Any]) -> str:
    """A training job's defense with its own settings and, where it trains against a threat, the budget."""
    text = label("defenses", what["defense"]["name"], what["defense"]["set"])
    if what["threat"] is None:
        return text
    budget = f"train_eps={what['threat']['eps']}"
    return f"{text[:-1]}, {budget})" if text.endswith(")") else f"{text} ({budget})"


def _short(kind: catalog.Kind, value: Any) -> str:
    if isinstance(value, dict) and "name" in value and "set" in value:
        return label(kind, value["name"], value["set"])
    return f"{value:g}" if isinstance(value, float) else str(value)
