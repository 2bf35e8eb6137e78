"""What a spec lists more than once. Equal entries are equal jobs, each of which is done once: the user is told so."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench.planning import catalog
from bench.planning.evaluations import combinations
from bench.planning.spec import AttackSpec, DefenseSpec, Spec


def duplicates(spec: Spec) -> list[str]:
    """One line for all of it; none where nothing is listed twice. Raises what reading a plug-in raises."""
    lists = {
        "defenses": [text for entry in spec.defenses for text in _entries("defenses", entry)],
        "attacks": [text for entry in spec.attacks for text in _entries("attacks", entry)],
        "models": [_text(m.name, catalog.get("models", m.name).resolve(m.set, "models ")) for m in spec.models or ()],
        "seeds": [str(seed) for seed in spec.seeds],
    }
    told = [_told(name, listed) for name, listed in lists.items() if len(set(listed)) < len(listed)]
    return [f"{' and '.join(told)} repeat another; each is done once"] if told else []


def _told(name: str, listed: Sequence[str]) -> str:
    return f"{len(listed) - len(set(listed))} of {len(listed)} {name}"


def _entries(kind: catalog.Kind, entry: DefenseSpec | AttackSpec) -> list[str]:
    """Each combination of an entry as text, with every default resolved: equal where the jobs are."""
    plugin, own = catalog.get(kind, entry.name), entry.model_dump(mode="json", exclude={"set", "grid", "shards"})
    return [_text(own, plugin.resolve(chosen, f"{kind} ")) for chosen in combinations(entry)]


def _text(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
