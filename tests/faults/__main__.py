"""The trials: `python -m tests.faults [SEED]`."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tqdm

from otl.callbacks.backups import newest, read_index
from otl.config import register
from tests.faults.ends import end
from tests.faults.events import (
    OFF,
    changed,
    cut_off,
    killed,
    moved_in_time,
    other_caption,
    red,
    refused,
    worker_killed,
    wrong_byte,
)
from tests.faults.lines import TRIALS
from tests.faults.moments import Fault
from tests.faults.world import ENDED, FINISHED, KILLED, World, short

BETWEEN = "between shards"


def trials(world: World, trial: str, kills: int) -> None:
    """Kill runs of a trial, let the system refuse, damage their newest checkpoint; start them again to the end.

    Args:
        kills: as many, at least; each run is killed as long as it goes on.
    """
    world.leave_alone(trial)
    until = world.done["kills"] + kills
    for number in itertools.count():
        name = f"{short(trial)}-{number}"
        attempts(world, trial, name, until - world.done["kills"])
        world.require_same(trial, name)
        shutil.rmtree(world.folder / name)
        if world.done["kills"] >= until:
            return


def attempts(world: World, trial: str, name: str, kills: int) -> None:
    """Start a run again and again until it comes to its end; at most so many times it is killed."""
    checkpoints = world.folder / name / "checkpoints"
    damaged: tuple[Path, Path] | None = None  # the newest, and the one before it
    for number in itertools.count():
        fault, taken = next_fault(world, trial, number) if kills else (None, None)
        clock, workers = world.draw.choice([0.0, -OFF, OFF]), world.draw.choice([0, 0, 1, 2])
        outcome = world.run(trial, name, fault, clock=clock, workers=workers)
        if damaged is not None:
            assert f"{damaged[0]} is damaged and passed over" in outcome.said, outcome.said
            assert f"resume=auto: from {damaged[1]}" in outcome.said, outcome.said
            damaged = None
        if taken is not None and outcome.faults:
            taken()  # else the run was over before, and another one is given the fault
        if outcome.code == FINISHED:
            return
        kills -= outcome.code == -signal.SIGKILL
        moved_in_time(sorted(checkpoints.glob("*.ckpt")), world.draw)
        there = [checkpoints / each for each in read_index(checkpoints)[0]]
        if len(there) > 1 and number % 2 and newest(checkpoints) == there[-1]:
            damaged = there[-1], there[-2]
            damage(world, there[-1])


def damage(world: World, checkpoint: Path) -> None:
    world.done["checkpoints damaged"] += 1
    harm = (cut_off, wrong_byte)[world.done["checkpoints damaged"] % 2]
    harm(checkpoint, world.draw)
    world.done[f"newest checkpoint: {harm.__name__}"] += 1


def next_fault(world: World, trial: str, number: int) -> tuple[Fault, Callable[[], object]]:
    """What happens to a run that is started for the so-manieth time, and what to call once it has happened."""
    if number == 2:
        error, moment, lasting = world.refusals[0]
        return Fault(*place(world, trial, moment), refused(error), lasting=lasting), world.refusals.popleft
    kills = [kill for kill in world.kills if moments(world, trial, kill)]
    kill = BETWEEN if number == 0 and BETWEEN in kills else kills[0]  # the cache is filled at the first start only
    return Fault(*place(world, trial, kill), killed), partial(world.kills.remove, kill)


def moments(world: World, trial: str, name: str) -> dict[str, int]:
    """The moments of that kind in a run that is left alone, and how many there are of each."""
    return {moment: count for moment, count in world.moments[trial].items() if moment.startswith(name)}


def place(world: World, trial: str, name: str) -> tuple[str, int]:
    """A moment of that kind, and which of them: not too late, since a run goes on from where the last one was."""
    there = moments(world, trial, name)
    moment = world.draw.choice(sorted(there))
    return moment, world.draw.randint(1, -(-there[moment] // 2))


def worker_dies(world: World, trial: str) -> None:
    """The run says what to do, has saved all its steps, and goes on."""
    name = f"{short(trial)}-worker"
    options = {"callbacks__checkpoint__every": 100}
    outcome = world.run(trial, name, Fault("after step", 2, worker_killed), workers=1, **options)
    assert outcome.code == ENDED, outcome.said
    assert "data.workers=1 processes that load batches was killed" in outcome.said, outcome.said
    assert outcome.faults == ["1 workers killed after step"]
    saved = newest(world.folder / name / "checkpoints")
    assert saved is not None, outcome.said
    assert f"saved {saved}; go on with resume=auto" in outcome.said, outcome.said
    assert world.run(trial, name).code == FINISHED
    world.require_same(trial, name)
    world.done["workers killed"] += 1


def dataset_changes(world: World, trial: str) -> None:
    """A run is refused that would go on with other data, unless that is allowed; put back, it goes on."""
    name = f"{short(trial)}-changed"
    world.run(trial, name, Fault("after step", 3, killed))
    changes: dict[str, Callable[[Path], None]] = {
        "1 images are changed, or their captions, masks or concept: 1.png": red,
        "1 images are changed, or their captions, masks or concept: 2.png": other_caption,
        "1 images are new: 9.png": red,
    }
    for text, change in changes.items():
        with changed(world.photos / text.split()[-1], change):
            outcome = world.run(trial, name)
            assert outcome.code == ENDED, outcome.said
            assert f"data: {text}\nput it back" in outcome.said, outcome.said
            world.done["data changed and refused"] += 1
            if change is other_caption:
                shutil.copytree(world.folder / name, world.folder / f"{name}-allowed")
                outcome = world.run(trial, f"{name}-allowed", allow_changes=True)
                assert outcome.code == FINISHED, outcome.said
                assert f"data: {text}" in outcome.said, outcome.said
                assert end(world.folder / f"{name}-allowed") != world.ends[trial]
                world.done["data changed and allowed"] += 1
    assert world.run(trial, name).code == FINISHED
    world.require_same(trial, name)


def main(folder: Path, seed: int = 0) -> dict[str, int]:
    """All trials; the counts of what was done."""
    register()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # else it keeps a thread
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    world = World(folder, random.Random(seed))
    world.make()
    gc.freeze()  # what is there already is neither looked through nor copied in the forks
    for number, trial in enumerate(TRIALS, start=1):
        trials(world, trial, -(-KILLED * number // len(TRIALS)) - world.done["kills"])
        print(f"{trial}: {world.done['kills']} kills of {world.done['processes']} processes", file=sys.stderr)
    worker_dies(world, "lora")
    dataset_changes(world, "lora")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    world.done["seconds of processor"] = round(sum(each.ru_utime + each.ru_stime for each in used))
    return dict(world.done)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place_for_all:
        done = main(Path(place_for_all), *map(int, sys.argv[1:]))
    print(json.dumps(done, indent=1, sort_keys=True))
