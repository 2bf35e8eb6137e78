"""Describes a plug-in and its settings in words, for `bench list` and the pages in docs/."""

from __future__ import annotations

import ast
from typing import Any, Literal, get_args, get_origin

from bench.planning import catalog
from bench.planning.plugin_source import REQUIRED, TYPES, Field

_SIGNS = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
_PREDICTORS = {
    "deterministic": "one net, the same answer each time",
    "randomised": "the net draws noise at prediction",
    "smoothed": "a vote of noisy predictions, with a certificate",
}
_NEEDED_DEFENSE = {"needs_smoothed": "--defense smoothing", "needs_draws": "--defense rse"}
_ONLY_FOR = {
    "needs_smoothed": "smoothed models",
    "needs_draws": "stochastic models",
    "needs_images": "models of a matrix: it shows them the images made against other rows",
}
_NO_THREAT = "norm and eps play no part in it"
_COST_UNIT = "of a training step, in forward passes F an image; a backward pass is 2F, to the image alone F"


def default(value: Any) -> str:
    """A default as it is written after `--set NAME.SETTING=` or in a spec: true, null, uniform, [1, 4], {name: pgd}."""
    if value is REQUIRED:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(default, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{name}: {default(each)}" for name, each in value.items())
        return default(value["name"]) if list(value) == ["name"] else f"{{{inside}}}"  # the short form of a base
    return str(value)


def values(field: Field) -> str:
    """Values of a setting: `float > 0`, `uniform | normal | zero`, `int or null`, `[int, ...]` for a list."""
    return _words(ast.parse(field.written, mode="eval").body)


def _words(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        return f"{_words(node.left)} or {_words(node.right)}"
    if isinstance(node, ast.Constant):
        return "null" if node.value is None else str(node.value)
    if isinstance(node, ast.Name):
        known = TYPES.get(node.id)
        return " | ".join(map(str, get_args(known))) if get_origin(known) is Literal else node.id
    if not isinstance(node, ast.Subscript):
        return ast.unparse(node)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    owner = ast.unparse(node.value)
    if owner == "Literal":
        return " | ".join(map(_words, parts))
    if owner == "Annotated":
        return f"{_words(parts[0])} {', '.join(map(_bound, parts[1:]))}"
    return {"list": f"[{_words(parts[0])}, ...]", "dict": "{name: value, ...}"}.get(owner, ast.unparse(node))


def _bound(node: ast.expr) -> str:
    assert isinstance(node, ast.Call)
    return f"{_SIGNS[ast.unparse(node.func)]} {ast.unparse(node.args[0])}"


def presets(plugin: catalog.Plugin) -> dict[str, str]:
    """The settings that each preset stands for."""
    found: dict[str, dict[str, Any]] = plugin.constant("presets", {})
    return {name: ", ".join(f"{k}={default(v)}" for k, v in each.items()) for name, each in found.items()}


def facts(plugin: catalog.Plugin) -> dict[str, str]:
    """The class constants of a defense or an attack, each with its meaning; empty for an architecture."""
    if plugin.kind == "models":
        return {}
    own = _of_defense(plugin) if plugin.kind == "defenses" else _of_attack(plugin)
    return own | {"revision": f"{plugin.revision} (raised when its results change)"}


def _of_defense(plugin: catalog.Plugin) -> dict[str, str]:
    recipe = ", ".join(f"{name} {default(each)}" for name, each in plugin.constant("recipe", {}).items())
    return {
        "trains at a budget": f"yes, in {', '.join(plugin.norms)}" if plugin.uses_threat else f"no: {_NO_THREAT}",
        "deploys": f"{plugin.predictor} ({_PREDICTORS[plugin.predictor]})",
        "cost": f"{plugin.constant('cost', '') or 'not said'} ({_COST_UNIT})",
        "adaptive attack": plugin.constant("adaptive_attacks", "") or "none named, so its rows are flagged (check C28)",
        "recipe settings it follows": ", ".join(plugin.constant("supports_recipe", ()))
        or "none of label_smoothing, bf16, fp16",
        "recipe of the paper": recipe or "none given; --recipe paper trains it by the shared one",
    }


def _of_attack(plugin: catalog.Plugin) -> dict[str, str]:
    metric = plugin.constant("metric", "")
    found = {"budget": f"norm and eps, in {', '.join(plugin.norms)}" if plugin.uses_threat else f"none: {_NO_THREAT}"}
    found["measures"] = f"{metric}, which is not robustness" if metric else "accuracy, image by image"
    if plugin.uses_threat and not plugin.needs_images:
        scores = plugin.constant("access", "gradients") == "scores"
        found["sees"] = "scores only" if scores else "gradients of the model's surrogate"
    only = [words for name, words in _ONLY_FOR.items() if plugin.constant(name, False)]
    return found | ({"only for": "; ".join(only)} if only else {})


def example(plugin: catalog.Plugin) -> str:
    """A command that runs the plug-in, with its first plain setting at the default."""
    option = {"defenses": "--defense", "attacks": "--attack", "models": "--model"}[plugin.kind]
    plain = [f for f in plugin.fields if isinstance(f.default, bool | int | float | str)]
    setting = f" --set {plugin.name}.{plain[0].name}={default(plain[0].default)}" if plain else ""
    norm = "" if "Linf" in plugin.norms else f" --norm {plugin.norms[0]}"
    if plugin.needs_images:  # its images come from another attack of the run
        return f"bench run {option} pgd,{plugin.name}{setting}"
    needed = [words for name, words in _NEEDED_DEFENSE.items() if plugin.constant(name, False)]
    return " ".join(["bench run", *needed, option, plugin.name]) + norm + setting
