"""Seconds from the command to the first step, and of the commands that should answer at once.

    python -m benchmarks.startup --size tiny

The command is watched from outside, by what it says and when. Importing the libraries alone, which no trainer of this
kind can avoid, is timed in the same round. Beside wall time stands the processor time of whole commands, which other
work on the machine disturbs less; the training command makes ten steps.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from otl.config import PACKAGE

IMPORTS = "import torch, lightning.pytorch, diffusers, transformers, peft; from diffusers import UNet2DConditionModel"
STAGES = {  # the beginning of a line -> what is done by then
    "precision ": "libraries imported, settings checked",
    "on ": "images scanned",
    "step 1/": "first step",
}
STEPS = 10  # OTL says every step of a run of ten


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="tiny")
    parser.add_argument("--families", nargs="+", choices=["sd15", "sdxl"], default=["sd15"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for checkpoints and photographs, to use them again")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/startup.json"))
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    with tempfile.TemporaryDirectory() as aside:
        folder = (asked.folder or Path(aside)).absolute()
        cases = [measure(asked, family, folder) for family in asked.families]
    results = {"size": asked.size, "images": asked.images, "cases": cases}
    show(cases)
    report.write(asked.out, results)
    return results


def measure(asked: argparse.Namespace, family: str, folder: Path) -> dict[str, Any]:
    """Every command once a round, so that what disturbs the machine disturbs all of them."""
    line = prepared(asked, family, folder)
    with tempfile.TemporaryDirectory() as run:
        commands = contenders(line, Path(run))
        rounds = [{name: timed() for name, timed in commands.items()} for _ in range(asked.rounds)]
    flat = [{key: value for stages in each.values() for key, value in stages.items()} for each in rounds]
    seconds = {name: report.spread([each[name] for each in flat]) for name in flat[0]}
    whole, imports = f"{STEPS} steps, cache filled, processor", "imports alone, processor"
    over = report.ratios([each[whole] for each in flat], [each[imports] for each in flat])
    return {"family": family, "seconds": seconds, "run_over_imports": over}


def contenders(line: list[str], run: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> what measures it: one or more named durations, seconds. In this order: one fills the next one's cache."""
    python = [sys.executable]
    otl = [*python, "-m", "otl"]
    plan = [*otl, "task=plan", *line, f"data.cache_dir={run / 'cache'}", f"hydra.run.dir={run / 'plan'}"]
    return {
        "imports": lambda: command("imports alone", [*python, "-c", IMPORTS], run),
        "help": lambda: command("--help", [*otl, "--help"], run),
        "plan": lambda: command("task=plan", plan, run),
        "empty": lambda: stages([*otl, *line], run, "cache empty", cache=run / "cache", fill=True),
        "filled": lambda: stages([*otl, *line], run, "cache filled", cache=run / "cache"),
    }


def prepared(asked: argparse.Namespace, family: str, folder: Path) -> list[str]:
    """The settings of a short run, its files made."""
    from benchmarks import checkpoints, photos

    side = checkpoints.SIZES[asked.size][family].resolution
    checkpoint = checkpoints.write(folder / f"{family}-{asked.size}", family, asked.size)
    images = photos.write(folder / f"photos-{side}-{asked.images}", asked.images, height=side, width=side)
    return [
        f"model={family}",
        f"model.checkpoint={checkpoint}",
        f"data.path={images}",
        f"data.resolution={side}",
        f"trainer.max_steps={STEPS}",
        "output.overwrite=true",
    ]


def command(name: str, words: list[str], folder: Path) -> dict[str, float]:
    """Seconds that a command takes, by both clocks."""
    started, used = time.perf_counter(), processor_seconds()
    subprocess.run(words, cwd=folder, env=environment(), capture_output=True, check=True)
    return {name: time.perf_counter() - started, f"{name}, processor": processor_seconds() - used}


def processor_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stages(words: list[str], folder: Path, name: str, *, cache: Path, fill: bool = False) -> dict[str, float]:
    """Seconds from the start of a training command to each of STAGES.

    Args:
        cache: used as it is.
        fill: empty it before.

    Raises:
        RuntimeError: the command did not come as far as its first step.
    """
    if fill:
        shutil.rmtree(cache, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        words = [*words, f"data.cache_dir={cache}", f"hydra.run.dir={Path(run) / 'run'}"]
        used = processor_seconds()
        found, said = watched(words, folder)
    if STAGES["step 1/"] not in found:
        raise RuntimeError(f"the run took no step: {said[-1] if said else 'it said nothing'}")
    return {f"{stage}, {name}": seconds for stage, seconds in found.items()} | {
        f"{STEPS} steps, {name}, processor": processor_seconds() - used
    }


def watched(words: list[str], folder: Path) -> tuple[dict[str, float], list[str]]:
    """When each of STAGES was reached, and all that was said."""
    found: dict[str, float] = {}
    said = []
    started = time.perf_counter()
    with subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            said.append(text.rstrip())
            for beginning, stage in STAGES.items():
                if text.startswith(beginning):
                    found.setdefault(stage, time.perf_counter() - started)
    return found, said


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PACKAGE.parent)}


def show(cases: list[dict[str, Any]]) -> None:
    rows = []
    for case in cases:
        rows += [[f"{case['family']}: {name}", report.show_spread(s, ".2f")] for name, s in case["seconds"].items()]
        ratio = report.show_spread(case["run_over_imports"], ".2f")
        rows.append([f"{case['family']}: {STEPS} steps / imports alone, processor", ratio])
    report.table("From the command", ["", "seconds"], rows)


if __name__ == "__main__":
    main()
