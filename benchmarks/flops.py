"""What a training step costs, counted on the meta device, and what the device can do at best, measured."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from otl.mistakes import compose_settings
from otl.tasks.memory import empty_batch
from otl.tasks.run import build_module
from otl.types import Size

SIDES = {"cuda": 8192, "cpu": 1024}  # of the square matrices, by type of device
REPEATS = 10


def training_flops(line: list[str], size: Size, batch_size: int) -> int:
    """Floating point operations of one forward and backward pass (a multiply-add is two), without the optimizer.

    Args:
        line: the settings, as on the command line.
    """
    module = build_module(compose_settings([*line, "logger=none"], name="config"))
    module.build_skeleton()
    module.to("meta")
    batch = empty_batch(size, batch_size)
    assert batch.pixels is not None
    with torch.no_grad():
        latents, cond = module.encode_image(batch.pixels), module.encode_prompt(batch.captions)
    with FlopCounterMode(display=False) as counted:
        t = torch.zeros(batch_size, dtype=torch.long, device="meta")
        module.predict(latents, t, cond, batch).sum().backward()
    return counted.get_total_flops()


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of large square matrices: the fastest of some."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)
