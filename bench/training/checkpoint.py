"""Files of unfinished work: tensors and short texts in one file with a checksum; a damaged file is ignored."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench.atomic import write_atomic


def write(path: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """Write tensors (from any device, stored on the CPU) and short texts atomically, with a checksum of all of it."""
    plain = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    path.parent.mkdir(exist_ok=True)
    data = save(plain, metadata={**texts, "checksum": _checksum(plain, texts)})
    write_atomic(path, lambda file: file.write(data))


def read(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors (on `device`) and texts, or None if the file is missing or damaged: the work is then repeated."""
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            plain = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError):
        return None
    if texts.pop("checksum", "") != _checksum(plain, texts):
        return None
    return {name: values.to(device) for name, values in plain.items()}, texts


def _checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
