"""The recipe of a training job, with every setting filled."""

from typing import Literal

from bench.planning.spec import TrainSpec


class Recipe(TrainSpec):
    """The settings of `TrainSpec`, without a null: the planner has filled them from the data set's defaults.

    A job omits settings that are younger than the first records while they have their default.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam"]
    lr: float
    weight_decay: float
    schedule: Literal["constant", "step", "cosine", "one_cycle", "cyclic"]
    augment: bool

    @property
    def recalibrates(self) -> bool:
        """True if averaged weights get BatchNorm statistics of their own, from one clean pass: default of `swa`."""
        return self.average_bn == "clean" or (self.average_bn is None and self.average == "swa")
