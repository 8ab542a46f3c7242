"""Steps and images per second of OTL beside those of plain loops around the same network.

    python -m benchmarks.train --size small --families sd15 sdxl --batch-sizes 1 2

OTL runs as on the command line, with all its default callbacks, on cached latents, and with a LoRA. After each block
of its steps the same process makes as many in a bare PyTorch loop, and in the loop of diffusers' example.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints, photos, report
from benchmarks.flops import training_flops
from benchmarks.loops import LOOPS
from otl.config import PACKAGE, register
from otl.types import Size

BATCHES = 32  # of an epoch, at least
IMAGES = 8  # files, at least; they are repeated
WARMUP = 8  # steps
DEFAULTS = {  # blocks, steps in each, batch sizes
    "tiny": (3, 4, [1]),
    "small": (12, 10, [1, 2]),
    "full": (6, 20, [1, 8]),
}


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=checkpoints.SIZES, default="small", help="full: real widths, for a GPU")
    parser.add_argument("--families", nargs="+", choices=checkpoints.SIZES["tiny"], default=["sd15", "sdxl"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="images")
    parser.add_argument("--blocks", type=int, help="of each loop, in turns")
    parser.add_argument("--steps", type=int, help="timed steps of a block")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS), help="what OTL is compared with")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, help="of the loader; on a CPU 0, so that their work is counted too")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of OTL")
    parser.add_argument("--folder", type=Path, help="for checkpoints and photographs, to use them again")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train.json"))
    return completed(parser.parse_args(line))


def completed(asked: argparse.Namespace) -> argparse.Namespace:
    """With the defaults that depend on other choices."""
    blocks, steps, batch_sizes = DEFAULTS[asked.size]
    if asked.device == "auto":
        asked.device = "cuda" if torch.cuda.is_available() else "cpu"
    asked.blocks, asked.steps = asked.blocks or blocks, asked.steps or steps
    asked.batch_sizes = asked.batch_sizes or batch_sizes
    if asked.workers is None:
        asked.workers = 2 if asked.device == "cuda" else 0
    if "bare" not in asked.loops:
        asked.loops.insert(0, "bare")
    return asked


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    register()
    with tempfile.TemporaryDirectory() as aside:
        folder = (asked.folder or Path(aside)).absolute()
        cases = [measure(asked, family, size, folder) for family in asked.families for size in asked.batch_sizes]
    results = {"size": asked.size, "cases": cases}
    show(cases)
    report.write(asked.out, results)
    return results


def measure(asked: argparse.Namespace, family: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """One family with one batch size, in a process of its own."""
    chosen = checkpoints.SIZES[asked.size][family]
    side = chosen.resolution
    checkpoint = checkpoints.write(folder / f"{family}-{asked.size}", family, asked.size, device=asked.device)
    images = photos.write(folder / f"photos-{side}", max(IMAGES, batch_size), height=side, width=side)
    case = {"family": family, "batch_size": batch_size, "resolution": side, "workers": asked.workers}
    with tempfile.TemporaryDirectory(dir=folder) as run:
        training = settings(asked, family, batch_size, side, checkpoint, images, Path(run))
        found, error = run_beside(asked, training, Path(run) / "versus.json")
    if found is None:
        return case | {"error": error}
    flops = training_flops([word for word in training if word.startswith(("model", "method"))], Size(side, side), 1)
    return case | summary(found, batch_size, flops * batch_size)


def settings(
    asked: argparse.Namespace, family: str, batch_size: int, side: int, checkpoint: Path, images: Path, run: Path
) -> list[str]:
    """OTL's command line."""
    count = len(list(images.glob("*.jpg")))
    repeats = -(-BATCHES * batch_size // count)
    total = WARMUP + asked.blocks * (settle(asked.workers) + asked.steps)
    return [
        f"model={family}",
        f"model.checkpoint={checkpoint}",
        f"data.concepts.photos.path={images}",
        f"data.concepts.photos.repeats={repeats}",
        f"data.resolution={side}",
        f"data.batch_size={batch_size}",
        f"data.workers={asked.workers}",
        f"data.cache_dir={run / 'cache'}",
        f"trainer.max_steps={total}",
        f"trainer.accelerator={asked.device}",
        f"hydra.run.dir={run / 'run'}",
        *asked.set,
    ]


def settle(workers: int) -> int:
    """Steps that use up what the workers made while another loop ran."""
    return 2 * workers + 2


def run_beside(asked: argparse.Namespace, line: list[str], path: Path) -> tuple[dict[str, Any] | None, str]:
    """What `Versus` wrote, or None and the last line that was said."""
    options = {
        "path": str(path),
        "loops": asked.loops,
        "blocks": asked.blocks,
        "steps": asked.steps,
        "settle": settle(asked.workers),
        "warmup": WARMUP,
    }
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "FORCE_COLOR": "1"}  # with the bar of a terminal
    command = [sys.executable, "-m", "benchmarks.attached", json.dumps(options), *line]
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(path.read_text()), ""
    return None, (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]


def summary(found: dict[str, Any], batch_size: int, flops: int) -> dict[str, Any]:
    """The ratios of neighbouring blocks, and what the loops reach."""
    own = found["loops"]["otl"]
    versus = {}
    for name, loop in found["loops"].items():
        seconds = statistics.median(loop["wall"])
        versus[name] = {
            "step_ms": report.spread([1e3 * value for value in loop["wall"]]),
            "steps_per_second": 1 / seconds,
            "images_per_second": batch_size / seconds,
            "mfu": flops / seconds / found["matmul_flops_per_second"],
            "memory_peak": max(loop["memory"], default=None),
        }
        if name != "otl":  # how much longer OTL takes, by both clocks
            wall, processor = (report.ratios(own[clock], loop[clock]) for clock in ("wall", "processor"))
            versus[name] |= {"otl_wall_ratio": wall, "otl_processor_ratio": processor}
    overhead = {clock: 100 * (versus["bare"][f"otl_{clock}_ratio"]["median"] - 1) for clock in ("wall", "processor")}
    return found | {"loops": versus, "blocks": found["loops"], "flops_per_step": flops, "overhead_percent": overhead}


def show(cases: list[dict[str, Any]]) -> None:
    rows = []
    for case in cases:
        name = f"{case['family']} {case['resolution']} px, batch {case['batch_size']}"
        if "error" in case:
            rows.append([name, case["error"]])
            continue
        for loop, found in case["loops"].items():
            rows.append([name, *cells(loop, found)])
            name = ""
    columns = ["", "loop", "step, ms", "images/s", "MFU", "peak memory", "OTL / loop, wall", "OTL / loop, processor"]
    report.table("Training", columns, rows)


def cells(loop: str, found: dict[str, Any]) -> list[str]:
    memory = f"{found['memory_peak'] / 2**30:.2f} GiB" if found["memory_peak"] else ""
    ratios = [report.show_spread(found[key]) for key in ("otl_wall_ratio", "otl_processor_ratio") if key in found]
    return [
        loop,
        report.show_spread(found["step_ms"], ".1f"),
        f"{found['images_per_second']:.2f}",
        f"{found['mfu']:.1%}",
        memory,
        *ratios,
    ]


if __name__ == "__main__":
    sys.exit(any("error" in case for case in main()["cases"]))
