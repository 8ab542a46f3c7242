"""Images per second and core from a file to the pixels of a bucket, beside the same work by other libraries.

    python -m benchmarks.pixels --side 1024 --rounds 5

Read, decode, scale with antialiasing, crop, float32 in -1..1, one thread, processor time. The libraries take turns.
"reduced": a JPEG is decoded as small as it can be without being enlarged afterwards. Beside the speed stands how far
the pixels are from those of Pillow's Lanczos filter on the whole image, in levels of 255: what is fast and far off is
no match. The best that OTL is held against is the fastest that is about as near (within a tenth) or nearer.
OpenCV is compared where it is installed (pip install opencv-python-headless); OTL does not need it.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks import photos, report
from otl.datamodules import images, views
from otl.datamodules.views import View
from otl.types import Size

FILES = [(1200, 1600, "jpg"), (1365, 2048, "jpg"), (3024, 4032, "jpg"), (1200, 1600, "png"), (1200, 1600, "webp")]
COUNT = 2  # files of each kind
NEAR = 1.1  # so many times as far off as OTL is still a match

Way = Callable[[Path, View], Tensor]
"""File, what of it is shown -> [3, H, W] in -1..1."""


def otl(path: Path, view: View) -> Tensor:
    return images.pixels(path, view, "white")


def pillow(path: Path, view: View) -> Tensor:
    """Reduced; only the crop is scaled."""
    with Image.open(path) as image:
        image.draft("RGB", (view.scaled.w, view.scaled.h))  # of a JPEG; others take no notice
        y, x = image.height / view.scaled.h, image.width / view.scaled.w
        (top, left), (h, w) = view.crop, view.bucket
        box = (left * x, top * y, (left + w) * x, (top + h) * y)
        return normal(np.array(image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC, box=box)))


def pillow_torch(path: Path, view: View) -> Tensor:
    """Pillow decodes, reduced, and torch scales."""
    with Image.open(path) as image:
        image.draft("RGB", (view.scaled.w, view.scaled.h))
        levels = np.array(image.convert("RGB"))
    return scaled(levels, view)


def turbo_torch(path: Path, view: View) -> Tensor:
    """libjpeg-turbo decodes without Pillow, torch scales."""
    return scaled(simplejpeg.decode_jpeg(path.read_bytes(), "RGB"), view)


def turbo_reduced(path: Path, view: View) -> Tensor:
    least = {"min_height": view.scaled.h, "min_width": view.scaled.w}
    return scaled(simplejpeg.decode_jpeg(path.read_bytes(), "RGB", **least), view)


def opencv(path: Path, view: View) -> Tensor:
    """Scaled by areas: the fastest filter without aliases that it has."""
    import cv2

    cv2.setNumThreads(1)
    levels = cv2.resize(cv2.imread(str(path)), (view.scaled.w, view.scaled.h), interpolation=cv2.INTER_AREA)
    (top, left), (h, w) = view.crop, view.bucket
    return normal(cv2.cvtColor(levels[top : top + h, left : left + w], cv2.COLOR_BGR2RGB))


def scaled(levels: np.ndarray, view: View) -> Tensor:
    whole = torch.from_numpy(levels).permute(2, 0, 1)[None]
    (top, left), (h, w) = view.crop, view.bucket
    shown = functional.interpolate(whole, size=tuple(view.scaled), mode="bicubic", antialias=True)
    return shown[0, :, top : top + h, left : left + w].float().div_(127.5).sub_(1).contiguous()


def normal(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(levels).permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()


def exact(path: Path, view: View) -> Tensor:
    """What the pixels are compared with."""
    with Image.open(path) as image:
        whole = image.convert("RGB").resize((view.scaled.w, view.scaled.h), Image.Resampling.LANCZOS)
    (top, left), (h, w) = view.crop, view.bucket
    return normal(np.array(whole)[top : top + h, left : left + w])


def ways(kind: str) -> dict[str, Way]:
    """Name of a library -> the work with it."""
    found = {"otl": otl, "pillow": pillow, "pillow + torch": pillow_torch}
    if kind == "jpg":
        found |= {"libjpeg-turbo + torch": turbo_torch, "the same, reduced": turbo_reduced}
    if importlib.util.find_spec("cv2"):
        found["opencv"] = opencv
    return found


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pixels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--side", type=int, default=1024, help="of the bucket, pixels")
    parser.add_argument("--shrink", type=int, default=1, help="the files' sides are divided by it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the images, to use them again")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pixels.json"))
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as aside:
        folder = (asked.folder or Path(aside)).absolute()
        sizes = [(Size(h // asked.shrink, w // asked.shrink), kind) for h, w, kind in FILES]
        cases = [measure(folder, size, kind, asked.side, asked.rounds) for size, kind in sizes]
    show(cases)
    report.write(asked.out, {"side": asked.side, "cases": cases})
    return {"cases": cases}


def measure(folder: Path, size: Size, kind: str, side: int, rounds: int) -> dict[str, Any]:
    """Files of one kind, by each library in turn."""
    paths = write(folder, size, kind)
    view = views.centred(size, Size(side, side))
    contenders = ways(kind)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, way in contenders.items():
            before = time.process_time()
            for path in paths:
                way(path, view)
            seconds[name].append(time.process_time() - before)
    seconds = {name: each[1:] for name, each in seconds.items()}  # the first time a library imports and allocates
    found = {}
    for name, way in contenders.items():
        off = [float((way(path, view) - exact(path, view)).abs().mean() * 127.5) for path in paths]
        found[name] = {
            "images_per_second": report.spread([len(paths) / each for each in seconds[name]]),
            "levels_off": sum(off) / len(off),
            "otl_ratio": report.ratios(seconds[name], seconds["otl"]),
        }
    others = [name for name in found if name != "otl"]
    nearest = min(found[name]["levels_off"] for name in others)
    near = max(nearest, NEAR * found["otl"]["levels_off"])
    rivals = [name for name in others if found[name]["levels_off"] <= near]
    best = min(rivals, key=lambda name: found[name]["otl_ratio"]["median"])
    return {"height": size.h, "width": size.w, "kind": kind, "contenders": found, "best": best}


def write(folder: Path, size: Size, kind: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{size.h}x{size.w}-{number}.{kind}" for number in range(COUNT)]
    for number, path in enumerate(paths):
        if not path.is_file():
            photos.photo(number, *size).save(path, quality=92)
    return paths


def show(cases: list[dict[str, Any]]) -> None:
    rows = []
    for case in cases:
        name = f"{case['height']} x {case['width']} {case['kind']}"
        for library, found in case["contenders"].items():
            speed, ratio = (report.show_spread(found[key]) for key in ("images_per_second", "otl_ratio"))
            rows.append(
                [
                    f"{name}: {library}{' (best)' if library == case['best'] else ''}",
                    speed,
                    ratio,
                    f"{found['levels_off']:.2f}",
                ]
            )
    report.table("Pixels", ["", "images/s and core", "OTL / it", "levels off"], rows)


if __name__ == "__main__":
    main()
