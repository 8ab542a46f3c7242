"""Runs that are killed, disks that are full, data that changes: whatever happens, a run goes on to the very same end.

`python -m tests.fault_trials` prints what was done to how many runs. One process imports torch and makes the tiny model
once; each run is a fork of it. No thread of Python's or of a pool runs then, which could hold a lock for ever.
"""

from __future__ import annotations

import collections
import csv
import errno
import gc
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tqdm
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file

from otl.callbacks.backups import newest, read_index
from otl.config import RunEnded, SettingsError, register
from otl.mistakes import compose_settings
from otl.modules import loading
from otl.modules.stable_diffusion import StableDiffusion
from otl.tasks import plan
from otl.tasks.train import train
from tests import tiny
from tests.cells import METHODS
from tests.faults import (
    KILLS,
    MARK,
    OFF,
    REFUSALS,
    Fault,
    clock_off,
    cut_off,
    killed,
    moved_in_time,
    refused,
    worker_killed,
    wrong_byte,
)

STEPS = 5
KILLED = 50  # times, over all methods
PATIENCE = 120  # seconds for a run
RANDOM = {"lora": ["method.dropout=0.1"]}  # method -> settings by which torch's own randomness counts
LINE = [
    "data.resolution=64",
    "data.batch_size=2",
    "data.validation_share=0.2",
    "data.workers=0",
    "trainer.val_check_interval=3",
    "logger=none",
    "output.dtype=fp32",
    "optimizer.lr=1e-3",
    "scheduler=cosine",
    f"trainer.max_steps={STEPS}",
    "callbacks.checkpoint.every=1",
    "callbacks.checkpoint.best=true",
    "callbacks.checkpoint.wait=0",
    "callbacks.ema.decay=0.6",
    "callbacks.sampling.every=4",
    "callbacks.sampling.first=false",
    "callbacks.progress=null",
    "sample.prompts=[a cat]",
    "sample.steps=1",
    "resume=auto",
]
KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "randomness", "global_step", "epoch")
ROUNDS = KILLED // len(KILLS) + 2  # of all that can happen
ERRORS = (errno.ENOSPC, errno.EIO)
CACHES = {"cache", "uses"}  # folders whose leftovers may be another process's work; `task=cache` sweeps them
FINISHED, ENDED, BROKEN = 0, 3, 9  # exit codes of a run: ENDED says why, BROKEN has a traceback


@dataclass
class Outcome:
    """How one process ended."""

    code: int
    said: str

    @property
    def faults(self) -> list[str]:
        """What happened to it."""
        return [line.removeprefix(MARK) for line in self.said.splitlines() if line.startswith(MARK)]


@dataclass
class World:
    """What all runs share: the model, loaded once, and where everything lies."""

    folder: Path
    draw: random.Random
    pipeline: Any = None
    composed: dict[str, DictConfig] = field(default_factory=dict)  # method -> settings
    plans: dict[str, Any] = field(default_factory=dict)  # method -> plan
    ends: dict[str, dict[str, bytes]] = field(default_factory=dict)  # method -> `end` of the run that was left alone
    moments: dict[str, collections.Counter[str]] = field(default_factory=dict)  # of that run
    done: collections.Counter[str] = field(default_factory=collections.Counter)  # what was done to runs
    kills: collections.deque[str] = field(default_factory=collections.deque)  # names of moments, to come
    refusals: collections.deque[tuple[int, str, bool]] = field(default_factory=collections.deque)  # to come

    def make(self) -> None:
        checkpoint = tiny.sd15(self.folder / "model")
        UNet2DConditionModel(
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=32,
            attention_head_dim=2,
            sample_size=8,
        ).save_pretrained(checkpoint / "unet")
        AutoencoderKL(
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
        ).save_pretrained(checkpoint / "vae")
        self.photos.mkdir()
        for number in range(5):
            Image.new("RGB", (64, 64), (50 * number, 100, 200)).save(self.photos / f"{number}.png")
            (self.photos / f"{number}.txt").write_text(f"picture {number} of a <cat>")
        family = StableDiffusion(str(checkpoint))
        self.pipeline = loading.load(family, str(checkpoint), dtypes={"default": torch.float32})
        every = [(*each, bool(number % 2)) for number, each in enumerate(itertools.product(ERRORS, REFUSALS))]
        for _ in range(ROUNDS):
            self.kills.extend(self.draw.sample(KILLS, len(KILLS)))
            self.refusals.extend(self.draw.sample(every, len(every)))

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    def settings(self, method: str) -> DictConfig:
        if method not in self.composed:
            where = [f"model.checkpoint={self.folder / 'model'}", f"data.path={self.photos}"]
            self.composed[method] = compose_settings(
                [*METHODS[method].line, *RANDOM.get(method, []), *where, *LINE], name="config"
            )
            self.plans[method] = plan.make(self.composed[method])
        return self.composed[method].copy()

    def run(self, method: str, name: str, fault: Fault | None = None, *, clock: float = 0.0, **options: Any) -> Outcome:
        """One run in the folder `name`, as a process of its own.

        Args:
            clock: seconds by which it is off.
            options: settings that are others, with "__" for ".".
        """
        folder, said = self.folder / name, self.folder / "said"
        folder.mkdir(exist_ok=True)
        settings = self.settings(method)
        settings.data.cache_dir = str(folder / "cache")
        for option, value in options.items():
            OmegaConf.update(settings, option.replace("__", "."), value)
        assert threading.active_count() == 1, "what another thread holds is held for ever in a fork"
        process = os.fork()
        if process == 0:
            # Nothing but the results of these very calls, which take longer than the run.
            loading.load = lambda *_, **__: self.pipeline
            plan.make = lambda *_, **__: self.plans[method]
            clock_off(clock)
            child(settings, folder, fault, said)
        self.done["processes"] += 1
        self.done[f"clock off by {clock:.0f} s"] += 1
        outcome = Outcome(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said.read_text(errors="replace"))
        killed_by_us = outcome.code == -signal.SIGKILL and outcome.faults
        assert outcome.code in {FINISHED, ENDED} or killed_by_us, outcome.said
        assert "Traceback" not in outcome.said, outcome.said
        if outcome.code == ENDED:
            assert any(text in outcome.said for text in ("go on with resume=auto", "allow_changes=true")), outcome.said
        self.done.update(outcome.faults)
        self.done["kills"] += bool(killed_by_us)
        return outcome

    def leave_alone(self, method: str) -> None:
        """The run that the others are compared with."""
        counting = Fault("", 1, killed)
        outcome = self.run(method, f"{short(method)}-whole", counting)
        assert outcome.code == FINISHED, outcome.said
        self.moments[method] = collections.Counter(json.loads(outcome.said.splitlines()[-1]))
        self.ends[method] = end(self.folder / f"{short(method)}-whole")
        assert len(self.ends[method]) > 100, "too little to compare"

    def require_same(self, method: str, name: str) -> None:
        """The run in a folder has come to its end, and to the one it must come to."""
        whole, found = self.ends[method], end(self.folder / name)
        different = sorted(key for key in whole.keys() | found.keys() if whole.get(key) != found.get(key))
        assert not different, f"{name} has other ends than a run that was left alone: {different}"
        left = [path for path in (self.folder / name).rglob("*.writing") if path.parent.name not in CACHES]
        assert not left, "half a file is left"
        self.done["same ends"] += 1


def short(method: str) -> str:
    return method.replace(" ", "")


def child(settings: DictConfig, folder: Path, fault: Fault | None, said: Path) -> None:
    """The forked process."""
    code = BROKEN
    try:
        signal.alarm(PATIENCE)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        if fault is not None:
            fault.install()
        train(settings, folder)
        if fault is not None:
            print(json.dumps(fault.seen))
        code = FINISHED
    except (RunEnded, SettingsError) as error:
        print(error)
        code = ENDED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


# What must be the same


def end(folder: Path) -> dict[str, bytes]:
    """All that a run leaves and that is not of its clock: tensors of its files, pictures, metrics, last checkpoint."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("samples/**/*.png")}
    for path in [*folder.glob("*.safetensors"), *folder.glob("final/**/*.safetensors")]:
        found |= {f"{path.relative_to(folder)}:{name}": content(tensor) for name, tensor in load_file(path).items()}
    last = torch.load(folder / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=True)
    found |= {name: content(value) for key in KEPT for name, value in values(last[key], key)}
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


# The trials


def trials(world: World, method: str, kills: int) -> None:
    """Kill runs of a method, let the system refuse, damage their newest checkpoint; start them again to the end.

    Args:
        kills: as many, at least; each run is killed as long as it goes on.
    """
    world.leave_alone(method)
    until = world.done["kills"] + kills
    for number in itertools.count():
        name = f"{short(method)}-{number}"
        attempts(world, method, name, until - world.done["kills"])
        world.require_same(method, name)
        shutil.rmtree(world.folder / name)
        if world.done["kills"] >= until:
            return


def attempts(world: World, method: str, name: str, kills: int) -> None:
    """Start a run again and again until it comes to its end; at most so many times it is killed."""
    checkpoints = world.folder / name / "checkpoints"
    damaged: tuple[Path, Path] | None = None  # the newest, and the one before it
    for number in itertools.count():
        fault = next_fault(world, method, number) if kills else None
        clock = world.draw.choice([0.0, -OFF, OFF])
        outcome = world.run(method, name, fault, clock=clock)
        if damaged is not None:
            assert f"{damaged[0]} is damaged and passed over" in outcome.said, outcome.said
            assert f"resume=auto: from {damaged[1]}" in outcome.said, outcome.said
            damaged = None
        if fault is not None and outcome.faults:
            (
                world.kills if fault.happen is killed else world.refusals
            ).popleft()  # else the run was over before, and another one is given the fault
        if outcome.code == FINISHED:
            return
        kills -= outcome.code == -signal.SIGKILL
        moved_in_time(sorted(checkpoints.glob("*.ckpt")), world.draw)
        there = [checkpoints / each for each in read_index(checkpoints)[0]]
        if len(there) > 1 and number % 2 and newest(checkpoints) == there[-1]:
            world.done["checkpoints damaged"] += 1
            damage = (cut_off, wrong_byte)[world.done["checkpoints damaged"] % 2]
            damage(there[-1], world.draw)
            world.done[f"newest checkpoint: {damage.__name__}"] += 1
            damaged = there[-1], there[-2]


def next_fault(world: World, method: str, number: int) -> Fault:
    """What happens to a run that is started for the so-manieth time."""
    if number == 2:
        error, moment, lasting = world.refusals[0]
        return Fault(*place(world, method, moment), refused(error), lasting=lasting)
    if number == 0 and "between shards" in world.kills:
        world.kills.remove("between shards")
        world.kills.appendleft("between shards")
    return Fault(*place(world, method, world.kills[0]), killed)


def place(world: World, method: str, name: str) -> tuple[str, int]:
    """A moment of that kind, and which of them: not too late, since a run goes on from where the last one was."""
    there = {moment: count for moment, count in world.moments[method].items() if moment.startswith(name)}
    moment = world.draw.choice(sorted(there))
    return moment, world.draw.randint(1, -(-there[moment] // 2))


def worker_dies(world: World, method: str) -> None:
    """The run says what to do, has saved all its steps, and goes on."""
    name = f"{short(method)}-worker"
    options = {"callbacks__checkpoint__every": 100, "data__workers": 1}
    outcome = world.run(method, name, Fault("after step", 2, worker_killed), **options)
    assert outcome.code == ENDED, outcome.said
    assert "data.workers=1 processes that load batches was killed" in outcome.said, outcome.said
    assert outcome.faults == ["1 workers killed after step"]
    saved = newest(world.folder / name / "checkpoints")
    assert saved is not None, outcome.said
    assert f"saved {saved}; go on with resume=auto" in outcome.said, outcome.said
    assert world.run(method, name).code == FINISHED
    world.require_same(method, name)
    world.done["workers killed"] += 1


def dataset_changes(world: World, method: str) -> None:
    """A run is refused that would go on with other data, unless that is allowed; put back, it goes on."""
    name = f"{short(method)}-changed"
    world.run(method, name, Fault("after step", 3, killed))
    changes: dict[str, Callable[[Path], None]] = {
        "1 images are changed, or their captions, masks or concept: 1.png": red,
        "1 images are changed, or their captions, masks or concept: 2.png": other_caption,
        "1 images are new: 9.png": red,
    }
    for text, change in changes.items():
        with changed(world.photos / text.split()[-1], change):
            outcome = world.run(method, name)
            assert outcome.code == ENDED, outcome.said
            assert f"data: {text}\nput it back" in outcome.said, outcome.said
            world.done["data changed and refused"] += 1
            if change is other_caption:
                shutil.copytree(world.folder / name, world.folder / f"{name}-allowed")
                outcome = world.run(method, f"{name}-allowed", allow_changes=True)
                assert outcome.code == FINISHED, outcome.said
                assert f"data: {text}" in outcome.said, outcome.said
                assert end(world.folder / f"{name}-allowed") != world.ends[method]
                world.done["data changed and allowed"] += 1
    assert world.run(method, name).code == FINISHED
    world.require_same(method, name)


def red(image: Path) -> None:
    Image.new("RGB", (64, 64), (255, 0, 0)).save(image)
    if not image.with_suffix(".txt").exists():
        other_caption(image)


def other_caption(image: Path) -> None:
    image.with_suffix(".txt").write_text("another caption")


@contextmanager
def changed(image: Path, change: Callable[[Path], None]) -> Iterator[None]:
    """An image and its caption are others in here, or are there in here only."""
    files = (image, image.with_suffix(".txt"))
    before = {file: file.read_bytes() for file in files if file.exists()}
    change(image)
    yield
    for file in files:
        if file in before:
            file.write_bytes(before[file])
        else:
            file.unlink()


def main(folder: Path, seed: int = 0) -> dict[str, int]:
    """All trials; the counts of what was done."""
    register()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # else it keeps a thread
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    world = World(folder, random.Random(seed))
    world.make()
    gc.freeze()  # what is there already is neither looked through nor copied in the forks
    for number, method in enumerate(METHODS, start=1):
        trials(world, method, -(-KILLED * number // len(METHODS)) - world.done["kills"])
        print(f"{method}: {world.done['kills']} kills of {world.done['processes']} processes", file=sys.stderr)
    worker_dies(world, "lora")
    dataset_changes(world, "lora")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    world.done["seconds of processor"] = round(sum(each.ru_utime + each.ru_stime for each in used))
    return dict(world.done)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place_for_all:
        done = main(Path(place_for_all), *map(int, sys.argv[1:]))
    print(json.dumps(done, indent=1, sort_keys=True))
