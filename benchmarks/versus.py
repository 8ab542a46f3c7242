"""OTL's training and plain loops in turns, in one process: a callback that times both."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.flops import matmul_ceiling
from benchmarks.loops import LOOPS, Bare
from otl import rng
from otl.callbacks.timing import paused
from otl.modules.base import DiffusionModule
from otl.types import Batch

KEPT = 8  # batches that the plain loops train on
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative error of a loss


class Stopwatch:
    """Seconds of wall time and of processor time, and peak memory, with all work on the device done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall: list[float] = []  # per step
        self.processor: list[float] = []  # per step, of all threads of this process
        self.memory: list[int] = []  # peak bytes allocated on the device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def stop(self, steps: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.memory.append(torch.cuda.max_memory_allocated())
        self.wall.append((time.perf_counter() - self._wall) / steps)
        self.processor.append((time.process_time() - self._processor) / steps)

    def report(self) -> dict[str, Any]:
        return {"wall": self.wall, "processor": self.processor, "memory": self.memory}


class Versus(Callback):
    """After every block of OTL's steps, a block of each plain loop on the same network and the same batches.

    A block of OTL is timed from this callback to this callback, so that whatever happens in a step is in it.

    Args:
        path: JSON that is written at the end.
        loops: names of LOOPS.
        blocks: of each loop.
        steps: timed in a block.
        settle: steps before each block that are not timed: caches refill, and what the loader's workers made ahead
            meanwhile is used up.
        warmup: steps before the first block.
    """

    def __init__(self, path: str, loops: list[str], *, blocks: int, steps: int, settle: int, warmup: int) -> None:
        self.path, self.names = Path(path), loops
        self.blocks, self.steps, self.settle, self.warmup = blocks, steps, settle, warmup
        self.count = 0
        self.batches: list[Batch] = []
        self.loops: dict[str, Bare] = {}
        self.watches: dict[str, Stopwatch] = {}
        self.loss_difference = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: DiffusionModule, batch: Batch, batch_idx: int) -> None:
        full = not self.batches or len(batch.captions) == len(self.batches[0].captions)
        if len(self.batches) < KEPT and full:
            self.batches.append(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count += 1
        if self.count < self.warmup:
            return
        place = (self.count - self.warmup) % (self.settle + self.steps)
        if self.count == self.warmup:
            self._prepare(trainer, pl_module)
        elif place == 0:
            self.watches["otl"].stop(self.steps)
            with paused(trainer):
                self._plain_blocks()
        elif place == self.settle:
            self.watches["otl"].start()

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        dtype = pl_module.autocast_dtype or torch.float32
        found = {
            "device": torch.cuda.get_device_name() if pl_module.device.type == "cuda" else "cpu",
            "precision": str(trainer.precision),
            "threads": torch.get_num_threads(),
            "loss_difference": self.loss_difference,
            "matmul_flops_per_second": matmul_ceiling(pl_module.device, dtype),
            "loops": {name: watch.report() for name, watch in self.watches.items()},
        }
        self.path.write_text(json.dumps(found))

    def _prepare(self, trainer: Trainer, module: DiffusionModule) -> None:
        clip = trainer.gradient_clip_val
        self.loops = {name: LOOPS[name](module, self.batches, clip=clip) for name in self.names}
        self.watches = {name: Stopwatch(module.device) for name in ("otl", *self.names)}
        self.loss_difference = loss_difference(module, self.batches[0], Bare(module, self.batches[:1], clip=clip))
        with paused(trainer):
            for loop in self.loops.values():
                for _ in range(self.warmup):
                    loop.step()

    def _plain_blocks(self) -> None:
        for name, loop in self.loops.items():
            for _ in range(self.settle):
                loop.step()
            self.watches[name].start()
            for _ in range(self.steps):
                loop.step()
            self.watches[name].stop(self.steps)


@torch.no_grad()
def loss_difference(module: DiffusionModule, batch: Batch, bare: Bare) -> float:
    """Relative difference of OTL's loss and the bare loop's on one batch.

    Raises:
        RuntimeError: they do not compute the same thing, so that comparing their speed would say nothing.
    """
    with module.autocast():
        own = module.losses(batch, u=rng.uniforms(batch.key.cpu(), "timestep"), stream="noise").mean().item()
    other = bare.forward().item()
    difference = abs(own - other) / abs(other)
    if not difference <= TOLERANCE[module.autocast_dtype or torch.float32]:
        raise RuntimeError(f"the bare loop's loss is {other:.6g} where OTL's is {own:.6g}: they differ in what they do")
    return difference
