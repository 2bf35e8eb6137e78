"""Training recipes: the shared one of each data set, the paper's, and the user's settings on top.

The shared recipe is small enough for a laptop on digits and MNIST, the field's usual one for BatchNorm nets on 32x32
images, and Adam for plain nets there, which a rate of 0.1 makes diverge.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bench.data import datasets
from bench.planning import catalog
from bench.planning.spec import Spec, TrainSpec

PLAIN_NETS = ("mlp", "lenet5", "small_cnn", "vit_tiny")
_ADAM = {"optimizer": "adam", "weight_decay": 0.0, "schedule": "constant"}
_SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "step", "epochs": 100, "batch_size": 128}
_PLAIN = {**_ADAM, "epochs": 20, "batch_size": 128, "lr": 1e-3}
SMALL_DATA = ("digits", "mnist", "fashion_mnist")
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {**_ADAM, "epochs": 20, "batch_size": 64, "lr": 2e-3},
    "mnist": {**_ADAM, "epochs": 4, "batch_size": 256, "lr": 1e-3},
    "fashion_mnist": {**_ADAM, "epochs": 10, "batch_size": 256, "lr": 1e-3},
    "svhn": {**_SGD, "lr": 0.01},
}


def recipe(spec: Spec, facts: datasets.Facts, model: str, paper: dict[str, Any]) -> dict[str, Any]:
    """Every training setting resolved: what the user set, else the paper's (`recipe: paper`), else the shared one."""
    own = {k: v for k, v in spec.train.model_dump().items() if k in spec.train.model_fields_set and v is not None}
    shared = _PLAIN if model in PLAIN_NETS and facts.name not in SMALL_DATA else RECIPES.get(facts.name, _SGD)
    base = {**shared, "augment": facts.augment}
    # validated once more, as a plug-in's recipe has to be, and so that 1 and 1.0 give one key
    try:
        checked = TrainSpec.model_validate({**base, **(paper if spec.recipe == "paper" else {}), **own})
    except ValidationError as error:
        raise ValueError(catalog.describe(error, "recipe")) from None
    values = checked.model_dump()
    defaults = {name: field.default for name, field in TrainSpec.model_fields.items()}
    for name, (owner, wanted) in checked.idle.items():
        if values[name] != defaults[name] and values[owner] not in wanted:
            raise ValueError(f"train.{name} is {values[name]}, but does nothing while train.{owner} is {values[owner]}")
    later = checked.settings_added_later
    return {name: value for name, value in values.items() if name not in later or value != defaults[name]}


def check_recipe(spec: Spec, training: dict[str, Any], defenses: list[str]) -> None:
    """Raise ValueError for a recipe setting that a defense ignores, and for `keep: best` without validation images."""
    wanted = {"label_smoothing": "label_smoothing"} if "label_smoothing" in training else {}
    if training.get("precision", "fp32") != "fp32":
        wanted["precision"] = training["precision"] if training["precision"] != "auto" else "bf16"
    for name in defenses:
        supported = catalog.get("defenses", name).constant("supports_recipe", ())
        for setting, feature in wanted.items():
            if feature not in supported:
                raise ValueError(
                    f"defense {name} does not take part in train.{setting}={training[setting]}; leave that setting "
                    "out, or run this defense without it"
                )
    if training.get("keep") == "best" and not spec.data.validation:
        raise ValueError(
            "train.keep is best, but data.validation is 0; expected images to choose by, such as --validation 1000"
        )
