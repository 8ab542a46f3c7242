"""What a run leaves, which must be the same whatever happened to it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.faults.lines import STEPS

KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "randomness", "global_step", "epoch")
SCALE = "MixedPrecision"  # of fp16, in the checkpoints of such runs


def end(folder: Path, steps: int = STEPS) -> dict[str, bytes]:
    """All that a run leaves and that is not of its clock: tensors of its files, pictures, metrics, last checkpoint."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("samples/**/*.png")}
    for path in [*folder.glob("*.safetensors"), *folder.glob("final*/**/*.safetensors")]:
        found |= {f"{path.relative_to(folder)}:{name}": content(tensor) for name, tensor in load_file(path).items()}
    last = torch.load(folder / "checkpoints" / f"step-{steps:08d}.ckpt", weights_only=True)
    kept = {key: last[key] for key in (*KEPT, SCALE) if key in KEPT or key in last}
    found |= {name: content(value) for name, value in values(kept, "checkpoint")}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            kept = {name: row[name] for name in row if name in {"epoch", "loss", "val_loss"} or "lr_" in name}
            found[f"metrics of step {row['step']}"] = repr(kept).encode()
    return found


def values(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What is in nested containers, by name."""
    if isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from values(each, f"{name}.{key}")
    else:
        yield name, value


def content(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return repr(value).encode()
