"""Seconds and memory to find every image of a large folder, and to plan a run with it.

    python -m benchmarks.index --images 100000 --rounds 3

index: `scan`, which reads the header and the caption of every image, in a process of its own.
plan: the whole command `python -m otl task=plan`, from its start to its end.
Both by wall time and by processor time of all their threads: other work on the machine disturbs the first.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import report

FOLDER = 1000  # images of one folder
SHAPES = [(64, 64), (64, 96), (96, 64), (64, 80), (112, 64), (72, 128), (64, 200)]  # height, width
TURNED = 4  # one of so many JPEGs has an EXIF orientation
ORIENTATION = 0x0112
MIB = 2**20

SCAN = """
import json, resource, sys, time
from otl.config import Data
from otl.datamodules.scan import scan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall, processor = time.perf_counter(), time.process_time()
samples, problems = scan(Data(path=sys.argv[1], cache_dir=sys.argv[2]))
found = {"images": len(samples), "wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(found | {"peak_bytes": peak * 1024, "grown_bytes": (peak - before) * 1024}))
"""


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="sd15", help="of the plan; its weights are not loaded")
    parser.add_argument("--folder", type=Path, help="for the images, to use them again")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/index.json"))
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    with tempfile.TemporaryDirectory() as aside:
        folder = write((asked.folder or Path(aside)).absolute() / f"images-{asked.images}", asked.images)
        rounds = [(index(folder, Path(aside)), plan(folder, Path(aside), asked.model)) for _ in range(asked.rounds)]
    results = {
        "images": asked.images,
        "index": summary([indexed for indexed, _ in rounds]),
        "plan": summary([planned for _, planned in rounds]),
    }
    show(results)
    report.write(asked.out, results)
    return results


def write(folder: Path, count: int) -> Path:
    """`count` small images, no two alike, two JPEGs for each PNG, each with its caption; made once."""
    draw = np.random.default_rng(0)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    for number in range(count):
        path = folder / f"{number // FOLDER:04d}" / f"image-{number:07d}{'.png' if number % 3 == 2 else '.jpg'}"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        h, w = SHAPES[number % len(SHAPES)]
        blobs = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        options = {"exif": turned} if path.suffix == ".jpg" and number % TURNED == 0 else {}
        blobs.resize((w, h), Image.Resampling.BILINEAR).save(path, **options)
        path.with_suffix(".txt").write_text(f"a made-up picture, number {number}\n")
    return folder


def index(folder: Path, aside: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", SCAN, str(folder), str(aside)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan(folder: Path, aside: Path, model: str) -> dict[str, float]:
    run = aside / f"run-{time.monotonic_ns()}"
    line = ["task=plan", f"model={model}", f"data.path={folder}", f"data.cache_dir={aside}", f"hydra.run.dir={run}"]
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "otl", *line], capture_output=True, check=True)
    seconds, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    made = json.loads((run / "plan.json").read_text())
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "images": made["images_total"],
        "wall": seconds,
        "processor": processor,
        "peak_bytes": after.ru_maxrss * 1024,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: report.spread([each[name] for each in rounds]) for name in rounds[0]}


def show(results: dict[str, Any]) -> None:
    rows = []
    for name in ("index", "plan"):
        found = results[name]
        seconds = [report.show_spread(found[clock], ".1f") for clock in ("wall", "processor")]
        rows.append([name, *seconds, f"{found['peak_bytes']['median'] / MIB:.0f}"])
    report.table(f"{results['images']} images", ["", "seconds, wall", "seconds, processor", "peak memory, MiB"], rows)


if __name__ == "__main__":
    main()
