"""The runs themselves: each is a fork of a process in which the models are there already."""

from __future__ import annotations

import collections
import itertools
import json
import logging
import os
import random
import signal
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from otl.cli import spelled_out
from otl.config import RunEnded, SettingsError
from otl.mistakes import compose_settings
from otl.tasks import plan
from otl.tasks.run import build_module
from otl.tasks.train import train
from tests import cells
from tests.faults.ends import end
from tests.faults.events import ERRORS, clock_off, killed
from tests.faults.lines import TRIALS, Trial
from tests.faults.moments import KILLS, MARK, REFUSALS, Fault

KILLED = 50  # times, over all trials
PATIENCE = 300  # seconds for a run
ROUNDS = KILLED // len(KILLS) + 2  # of all that can happen
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
class Made:
    """What the runs of one trial share."""

    settings: DictConfig
    plan: Any
    family: type
    pipeline: Any


@dataclass
class World:
    """What all runs share, and where everything lies."""

    folder: Path
    draw: random.Random
    words: dict[str, list[str]] = field(default_factory=dict)  # family -> those of a line that choose its checkpoint
    pipelines: dict[str, Any] = field(default_factory=dict)  # family -> its networks, loaded once
    made: dict[str, Made] = field(default_factory=dict)  # by trial
    ends: dict[str, dict[str, bytes]] = field(default_factory=dict)  # trial -> `end` of the run that was left alone
    moments: dict[str, collections.Counter[str]] = field(default_factory=dict)  # of that run
    done: collections.Counter[str] = field(default_factory=collections.Counter)  # what was done to runs
    kills: collections.deque[str] = field(default_factory=collections.deque)  # names of moments, to come
    refusals: collections.deque[tuple[int, str, bool]] = field(default_factory=collections.deque)  # to come

    def make(self) -> None:
        self.photos.mkdir()
        for number in range(6):
            make_photo(self.photos / f"{number}.png", number)
        for name, trial in TRIALS.items():
            self.made[name] = self.prepare(trial)
        every = [(*each, bool(number % 2)) for number, each in enumerate(itertools.product(ERRORS, REFUSALS))]
        for _ in range(ROUNDS):
            self.kills.extend(self.draw.sample(KILLS, len(KILLS)))
            self.refusals.extend(self.draw.sample(every, len(every)))

    def prepare(self, trial: Trial) -> Made:
        folder = self.folder / trial.family
        if trial.family not in self.words:
            self.words[trial.family] = cells.build(trial.family, folder)
            if trial.family == "sd15":
                make_smaller(folder)
        line = [*self.words[trial.family], f"data.path={self.photos}", *trial.line]
        settings = compose_settings(spelled_out(line), name="config")
        module = build_module(settings)
        if trial.family not in self.pipelines:
            self.pipelines[trial.family] = module.load_pipeline()
        made, problems = plan.make(settings)
        assert not [problem for problem in problems if problem.fatal], problems
        return Made(settings, (made, problems), type(module), self.pipelines[trial.family])

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    def run(
        self, trial: str, name: str, fault: Fault | None = None, *, clock: float = 0.0, workers: int = 0, **options: Any
    ) -> Outcome:
        """One run in the folder `name`, as a process of its own.

        Args:
            clock: seconds by which it is off.
            workers: processes that load its batches.
            options: settings that are others, with "__" for ".".
        """
        folder, said = self.folder / name, self.folder / "said"
        folder.mkdir(exist_ok=True)
        made = self.made[trial]
        settings = made.settings.copy()
        settings.data.cache_dir, settings.data.workers = str(folder / "cache"), workers
        for option, value in options.items():
            OmegaConf.update(settings, option.replace("__", "."), value)
        assert threading.active_count() == 1, "what another thread holds is held for ever in a fork"
        process = os.fork()
        if process == 0:
            # Nothing but the results of these very calls, which take longer than the run.
            made.family.load_pipeline = lambda *_, **__: made.pipeline
            plan.make = lambda *_, **__: made.plan
            clock_off(clock)
            child(settings, folder, fault, said)
        self.done["processes"] += 1
        self.done[f"clock off by {clock:.0f} s"] += 1
        self.done[f"{workers} workers"] += 1
        outcome = Outcome(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said.read_text(errors="replace"))
        killed_by_us = outcome.code == -signal.SIGKILL and outcome.faults
        assert outcome.code in {FINISHED, ENDED} or killed_by_us, outcome.said
        assert "Traceback" not in outcome.said, outcome.said
        if outcome.code == ENDED:
            assert any(text in outcome.said for text in ("go on with resume=auto", "allow_changes=true")), outcome.said
        self.done.update(outcome.faults)
        self.done["kills"] += bool(killed_by_us)
        return outcome

    def leave_alone(self, trial: str) -> None:
        """The run that the others are compared with."""
        counting = Fault("", 1, killed)
        outcome = self.run(trial, f"{short(trial)}-whole", counting)
        assert outcome.code == FINISHED, outcome.said
        self.moments[trial] = collections.Counter(json.loads(outcome.said.splitlines()[-1]))
        self.ends[trial] = end(self.folder / f"{short(trial)}-whole")
        assert len(self.ends[trial]) > 100, "too little to compare"

    def require_same(self, trial: str, name: str) -> None:
        """The run in a folder has come to its end, and to the one it must come to."""
        whole, found = self.ends[trial], end(self.folder / name)
        different = sorted(key for key in whole.keys() | found.keys() if whole.get(key) != found.get(key))
        assert not different, f"{name} has other ends than a run that was left alone: {different}"
        left = [path for path in (self.folder / name).rglob("*.writing") if path.parent.name not in CACHES]
        assert not left, "half a file is left"
        self.done["same ends"] += 1


def short(trial: str) -> str:
    return trial.replace(" ", "-")


def make_photo(path: Path, number: int) -> None:
    """One whose mirror image and whose cuts are others, with a caption of tags."""
    ramp = Image.linear_gradient("L").rotate(45 * number).resize((64 + 32 * (number % 2), 80))
    Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp.point(lambda v: v // 2))).save(path)
    path.with_suffix(".txt").write_text(f"picture {number} of a <cat>, red, at night, grainy")


def make_smaller(checkpoint: Path) -> None:
    """Networks of half the size: most trials are made with them."""
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


def child(settings: DictConfig, folder: Path, fault: Fault | None, said: Path) -> None:
    """The forked process."""
    code = BROKEN
    try:
        signal.alarm(PATIENCE)
        torch.set_num_threads(1)  # makes torch's thread pool anew, before two threads do so at once and one fails
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
