"""The whole way of a cell: train, draw, stop and go on, export."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from otl.datamodules.images import header_size
from otl.modules.base import DiffusionModule
from otl.testing.cells import STEPS, STOP, Cell
from otl.testing.comparing import require
from otl.types import Size


def check_run(cell: Cell) -> tuple[DiffusionModule, Path]:
    """A run draws and exports; one that was resumed in its middle draws and writes bit for bit the same.

    Returns:
        The module as it was when the run ended, by the checkpoint of its last step; and the result.
    """
    whole = cell.run("whole")
    result, side = cell.result(whole), cell.side()
    drawn = sorted((whole / "samples").glob(f"step-{STEPS:06d}/*-seed0.png"))
    sizes = [header_size(path) for path in drawn]
    require(sizes == [Size(side, side)], f"one picture of {side}x{side} was asked for, drawn are {sizes}")

    resumed = cell.run("resumed", f"resume={whole / 'checkpoints' / f'step-{STOP:08d}.ckpt'}")
    one, other = contents(whole), contents(resumed)
    odd = sorted(one.keys() ^ other.keys())
    require(not odd, f"the resumed run wrote other tensors and pictures: {odd[:2]}")
    wrong = [name for name in one if one[name] != other[name]]
    require(not wrong, f"the resumed run wrote {len(wrong)} tensors and pictures otherwise, such as {wrong[:1]}")

    live = cell.module()
    state = torch.load(whole / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=True)["state_dict"]
    live.load_state_dict(state, strict=False)
    return live, result


def contents(run: Path) -> dict[str, bytes]:
    """The tensors of all that a run wrote, by file and name, and the pictures of its last step."""
    files = [path for path in run.glob("**/*.safetensors") if "checkpoints" not in path.parts]
    pictures = {path.name: path.read_bytes() for path in run.glob(f"samples/step-{STEPS:06d}/*.png")}
    return pictures | {
        f"{path.relative_to(run)}:{name}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for path in files
        for name, tensor in load_file(path).items()
        if tensor.dim()
    }
