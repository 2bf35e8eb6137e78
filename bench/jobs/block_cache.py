"""Finished blocks of an evaluation, and the state of an attack within a block, on disk while the evaluation runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.training import checkpoint


@dataclass(frozen=True)
class BlockCache:
    """Tensors by name in a folder. `origin`: digest of code, weights and images; tensors of another origin are not
    read."""

    folder: Path
    origin: str

    def read(self, name: str, device: torch.device) -> tuple[dict[str, Tensor], float]:
        """The tensors of a name and the seconds they took; empty if there are none of this origin."""
        found = checkpoint.read(self.folder / f"{name}.safetensors", device)
        if found is None or found[1].get("origin") != self.origin:
            return {}, 0.0
        return found[0], float(found[1]["seconds"])

    def write(self, name: str, tensors: dict[str, Tensor], seconds: float) -> None:
        """Store tensors and the seconds they took."""
        facts = {"origin": self.origin, "seconds": repr(seconds)}
        checkpoint.write(self.folder / f"{name}.safetensors", tensors, facts)

    def drop(self, name: str) -> None:
        """Remove the tensors of a name."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
