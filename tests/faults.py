"""Runs that are killed, and disks that are full: whatever happens, the run goes on to the very same end.

`python -m tests.faults [KILLS]` prints what was done to how many runs. One process imports torch and makes the tiny
model once; each run is a fork of it, in which the operating system, and nothing of OTL, is made to fail.

Not part of the suite yet: its last trial ended with other files than the unbroken run, and it is not known whether that
is OTL's fault or this harness's. `trial(world, "lora", 7, random.Random(0))` shows it.
"""

from __future__ import annotations

import builtins
import collections
import copy
import csv
import errno
import functools
import io
import itertools
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from otl.callbacks.backups import newest
from otl.callbacks.snapshot import tensors
from otl.config import RunEnded, register
from otl.mistakes import compose_settings
from otl.modules import loading
from otl.modules.stable_diffusion import StableDiffusion
from otl.tasks import plan
from otl.tasks.train import train
from tests import tiny
from tests.cells import METHODS

NAMES = [name for name in METHODS if "+" not in name]  # of methods
STEPS = 6
KILLS = 56
PATIENCE = 300  # seconds for a run
LINE = [
    "data.resolution=64",
    "data.batch_size=2",
    "data.validation_share=0.2",
    "trainer.val_check_interval=3",
    "logger=none",
    "output.dtype=fp32",
    "optimizer.lr=1e-3",
    "scheduler=cosine",
    f"trainer.max_steps={STEPS}",
    "callbacks.checkpoint.every=1",
    "callbacks.checkpoint.best=true",
    "callbacks.checkpoint.wait=0",
    "callbacks.ema.decay=0.8",
    "callbacks.sampling.every=4",
    "callbacks.sampling.first=false",
    "callbacks.progress=null",
    "sample.prompts=[a cat]",
    "sample.steps=1",
    "resume=auto",
]


@dataclass
class World:
    """What all runs share: the model, loaded once, and where everything lies."""

    folder: Path
    pipeline: Any = None
    composed: dict[str, DictConfig] = field(default_factory=dict)  # method -> settings
    plans: dict[str, Any] = field(default_factory=dict)  # method -> plan
    history: list[Any] = field(default_factory=list)  # how the runs of a method ended
    done: collections.Counter[str] = field(default_factory=collections.Counter)  # what was done to runs

    def make(self) -> None:
        checkpoint = tiny.sd15(self.folder / "model")
        photos = self.folder / "photos"
        photos.mkdir()
        for number in range(5):
            Image.new("RGB", (64, 64), (50 * number, 100, 200)).save(photos / f"{number}.png")
            (photos / f"{number}.txt").write_text(f"picture {number} of a <cat>")
        family = StableDiffusion(str(checkpoint))
        self.pipeline = loading.load(family, str(checkpoint), dtypes={"default": torch.float32})

    def run(self, method: str, name: str, fault: Fault | None = None, *, workers: int = 0) -> tuple[int, str]:
        """One run, as a process of its own: how it ended (see `child`), and what it said."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        settings = self.settings(method)
        settings.data.cache_dir, settings.data.workers = str(folder / "cache"), workers
        if method not in self.plans:
            self.plans[method] = plan.make(settings)
        said = self.folder / "said"
        process = os.fork()
        if process == 0:
            # Nothing but the results of these very calls, which take longer than the run.
            loading.load = lambda *_, **__: self.pipeline
            plan.make = lambda *_, **__: copy.deepcopy(self.plans[method])
            child(settings, folder, fault, said)
        self.done["runs"] += 1
        signal.alarm(PATIENCE)
        status = os.waitpid(process, 0)[1]
        signal.alarm(0)
        return os.waitstatus_to_exitcode(status), said.read_text()

    def settings(self, method: str) -> DictConfig:
        if method not in self.composed:
            where = [f"model.checkpoint={self.folder / 'model'}", f"data.path={self.folder / 'photos'}"]
            self.composed[method] = compose_settings([*METHODS[method].line, *where, *LINE], name="config")
        return self.composed[method].copy()


ENDED, BROKEN = 3, 9  # exit codes of a run that ended by itself and said why, and of one with a traceback


def child(settings: DictConfig, folder: Path, fault: Fault | None, said: Path) -> None:
    """The forked process."""
    code = BROKEN
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        if fault is not None:
            fault.install()
        train(settings, folder)
        print(0 if fault is None else next(fault.moments) - 1)
        code = 0
    except RunEnded as error:
        print(error)
        code = ENDED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


# What can go wrong


class Fault:
    """Something that happens once, at a chosen call to the operating system or a chosen moment of a step.

    Args:
        number: which of the moments, counted from the start of the process.
        happen: what happens.
        clock: seconds by which the clock of the wall is off.
        lasting: whether it happens at every moment from then on.
    """

    def __init__(
        self, number: int, happen: Callable[[str], None], *, clock: float = 0.0, lasting: bool = False
    ) -> None:
        self.number, self.happen, self.clock, self.lasting = number, happen, clock, lasting
        self.moments = itertools.count(1)

    def moment(self, name: str) -> None:
        number = next(self.moments)
        if number == self.number or (self.lasting and number > self.number):
            self.happen(name)

    def install(self) -> None:
        """Into this process, which is not to be used for anything else any more."""
        for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "open")):
            setattr(module, name, self.around(getattr(module, name), name))
        opened = io.open
        io.open = builtins.open = lambda *args, **options: self.written(opened(*args, **options))  # type: ignore[assignment]
        if self.happen is killed:
            backward = torch.Tensor.backward
            torch.Tensor.backward = self.around(backward, "backward")  # type: ignore[method-assign,assignment]
            register_optimizer_step_post_hook(lambda *_: self.moment("step"))
        if self.clock:
            now = time.time
            time.time = lambda: now() + self.clock

    def around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Something may happen right before a call, and right after it."""

        @functools.wraps(call)
        def watched(*args: Any, **options: Any) -> Any:
            self.moment(f"before {name}")
            found = call(*args, **options)
            if self.happen is killed:
                self.moment(f"after {name}")
            return found

        return watched

    def written(self, file: Any) -> Any:
        return Half(file, self) if file.writable() and file.name != "/dev/null" else file


class Half:
    """A file of which half is written when something happens."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self.file, self.fault = file, fault

    def write(self, content: Any) -> int:
        half = len(content) // 2
        if half and len(content) > 100:
            self.file.write(content[:half])
            self.file.flush()
            self.fault.moment("within write")
            return half + self.file.write(content[half:])
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Half:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.file)


def killed(name: str) -> None:
    """kill -9, the power, the kernel: nothing is told and nothing is cleaned up."""
    print(f"killed {name}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def says(number: int) -> Callable[[str], None]:
    """The operating system refuses."""

    def refused(name: str) -> None:
        if not name.startswith("after"):
            print(f"{errno.errorcode[number]} {name}", flush=True)
            raise OSError(number, os.strerror(number))

    return refused


def damage(path: Path, draw: random.Random) -> str:
    """A checkpoint that lost its end, or a byte of it."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        path.write_bytes(content[: draw.randrange(len(content))])
        return "cut off"
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return "with a wrong byte"


# What must be the same


def result(folder: Path) -> dict[str, bytes]:
    """All that a run leaves and that is not of its clock: tensors of its files, pictures, metrics, last checkpoint."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("samples/**/*.png")}
    for path in [*folder.glob("*.safetensors"), *folder.glob("final/*/*.safetensors")]:
        found |= {f"{path.relative_to(folder)}:{name}": data(tensor) for name, tensor in load_file(path).items()}
    last = torch.load(folder / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=True)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "randomness"):
        found |= {f"{name} {number}": data(tensor) for number, tensor in enumerate(tensors(last[name]))}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            kept = {name: row[name] for name in row if name in {"epoch", "loss", "val_loss"} or "lr_" in name}
            found[f"metrics of step {row['step']}"] = repr(kept).encode()
    return found


def data(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def differences(whole: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in whole.keys() | other.keys() if whole.get(name) != other.get(name))


# The trial


def trial(world: World, method: str, kills: int, draw: random.Random) -> None:
    """Kill runs of a method, start them again, and compare what comes out in the end with a run that was left alone."""
    code, said = world.run(method, f"{method}-whole", Fault(0, killed))
    assert code == 0, said
    whole = result(world.folder / f"{method}-whole")
    assert len(whole) > 10, "too little to compare"
    moments = int(said.splitlines()[-1])
    reached = 0
    for number in itertools.count():
        name = f"{method}-{number}"
        before = world.done["kills"]
        attempts(world, method, name, kills - reached, moments, draw)
        reached += world.done["kills"] - before
        folder = world.folder / name
        assert differences(whole, result(folder)) == [], f"{name}: {world.history}"
        assert not list(folder.rglob("*.writing")), "half a file is left"
        if reached >= kills:
            return


def attempts(world: World, method: str, name: str, kills: int, moments: int, draw: random.Random) -> None:
    """Start a run again and again until it comes to its end; at most so many times it is killed.

    Args:
        moments: at which something can happen, in a run that is left alone.
    """
    for number in itertools.count():
        fault = some_fault(number, kills, moments, draw)
        code, said = world.run(method, name, fault, workers=int(draw.random() < 0.1))
        world.history.append((code, [line for line in said.splitlines() if line.startswith(("killed", "E"))][:2]))
        if code == -signal.SIGKILL:
            world.done["kills"] += 1
            kills -= 1
            world.done[next(line for line in said.splitlines() if line.startswith("killed"))] += 1
        else:
            assert "Traceback" not in said, said
            assert code in {0, ENDED}, said
            if code == ENDED:
                world.done[next(line for line in said.splitlines() if line.startswith("E"))] += 1
        if code == 0 and (fault is None or kills <= 0 or "E" not in said):
            return
        spoil(world, world.folder / name / "checkpoints", draw)


def some_fault(number: int, kills: int, moments: int, draw: random.Random) -> Fault | None:
    """The next one; none once there were enough."""
    clock = draw.choice([0.0, -1e6, 1e6])
    if kills <= 0:
        return None
    if number % 4 == 3:
        refusal = says(draw.choice([errno.ENOSPC, errno.EIO]))
        return Fault(draw.randrange(1, moments // 2), refusal, clock=clock, lasting=draw.random() < 0.5)
    return Fault(draw.randrange(1, moments // 2), killed, clock=clock)


def spoil(world: World, folder: Path, draw: random.Random) -> None:
    """Now and then the newest of several checkpoints is damaged, and the times of files are mixed up."""
    there = sorted(folder.glob("*.ckpt"))
    for path in there:
        moment = draw.uniform(1e9, 2e9)
        os.utime(path, (moment, moment))
    last = newest(folder)
    if len(there) > 1 and last is not None and draw.random() < 0.2:
        world.done[f"newest checkpoint {damage(last, draw)}"] += 1


def main(kills: int = KILLS, seed: int = 0) -> World:
    register()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.make()
        for number, method in enumerate(NAMES):
            share = -(-kills * (number + 1) // len(NAMES)) - world.done["kills"]
            trial(world, method, share, random.Random(seed + number))
            print(f"{method}: {world.done['kills']} kills so far, {time.monotonic() - started:.0f} s", flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{world.done['kills']} kills over {len(NAMES)} methods, in {world.done['runs']} processes and "
        f"{used.ru_utime + used.ru_stime:.0f} s of processor; all came to the end of the run that was left alone:"
    )
    for name, count in sorted(world.done.items()):
        print(f"{count:5d} {name}")
    return world


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
