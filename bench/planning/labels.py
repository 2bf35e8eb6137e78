"""Short display names: a plug-in with the settings that differ from its defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.planning.job_fields import JobThreat

if TYPE_CHECKING:
    from bench.planning import catalog


def label(kind: catalog.Kind, name: str, settings: dict[str, Any]) -> str:
    """`pgd (loss=cw, steps=40)`: the name and the settings that differ from the plug-in's defaults, but for those that
    it calls `unnamed_settings`. All of a preset's values together are `preset=NAME`.

    All settings where the plug-in file is gone. A base is always named, with its own settings: `awp (base=trades)`.
    """
    from bench.planning import catalog  # here: commands that only read records need no plug-ins

    try:
        plugin = catalog.get(kind, name)
        defaults, unnamed = plugin.resolve({}), plugin.constant("unnamed_settings", ())
        presets = {name: plugin.resolve({"preset": name}) for name in plugin.constant("presets", {})}
    except (LookupError, ValueError):
        defaults, unnamed, presets = {}, (), {}
    named = {k: v for k, v in settings.items() if k not in unnamed}
    own = {k: v for k, v in named.items() if k == "base" or k not in defaults or defaults[k] != v}
    for preset, values in presets.items():
        changed = {k: v for k, v in values.items() if defaults[k] != v}
        if changed and changed.items() <= own.items():
            own = {"preset": preset, **{k: v for k, v in own.items() if k not in changed}}
            break
    text = ", ".join(f"{k}={_short(kind, v)}" for k, v in sorted(own.items()))
    return f"{name} ({text})" if text else name


def with_train_eps(text: str, threat: JobThreat | None) -> str:
    """The label of a defense and, where it trains against a threat, the radius: `pgd_at (steps=7, train_eps=8/255)`."""
    if threat is None:
        return text
    radius = f"train_eps={threat.eps}"
    return f"{text[:-1]}, {radius})" if text.endswith(")") else f"{text} ({radius})"


def _short(kind: catalog.Kind, value: Any) -> str:
    if isinstance(value, dict) and "name" in value and "set" in value:
        return label(kind, value["name"], value["set"])
    return f"{value:g}" if isinstance(value, float) else str(value)
