"""Images per second into the cache, beside the same work written by hand.

    python -m benchmarks.cache --images 32 --encoder none vae

encoder none: the encoder does nothing, which leaves reading, decoding, scaling and writing; by hand that is Pillow in
as many threads, decoding in full, and once more with libjpeg's reduced decoding.
encoder vae: a VAE of the real size with random weights; by hand that is the VAE alone on pixels that wait in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import checkpoints, photos, report
from otl.config import Concept, Data
from otl.datamodules.bucketed import BucketedDataModule
from otl.datamodules.filling import THREADS
from otl.modules.stable_diffusion import encode_vae
from otl.types import Cond


class NoEncoder:
    """Takes no time."""

    device = torch.device("cpu")

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, H/8, W/8]: some of the pixels, so that files of the usual size are written."""
        return pixels[:, :, ::8, ::8]

    def encode_prompt(self, captions: list[str]) -> Cond:
        return {"hidden": torch.zeros(len(captions), 1)}

    def image_identity(self) -> str:
        return "benchmark"

    def prompt_identity(self) -> str:
        return "benchmark"


class RealVae(NoEncoder):
    """SD 1.5's VAE at its real width, or a narrow one, with random weights."""

    def __init__(self, device: torch.device, *, narrow: bool) -> None:
        from diffusers import AutoencoderKL

        self.device = device
        changes = checkpoints.NARROW_VAE if narrow else {}
        with device:
            self.vae = AutoencoderKL.from_config(checkpoints.config("sd15", "vae") | changes).eval()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode_vae(self.vae, pixels)


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--encoder", nargs="+", choices=["none", "narrow", "vae"], default=["none"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--height", type=int, default=1200, help="pixels of the files")
    parser.add_argument("--width", type=int, default=1600, help="pixels of the files")
    parser.add_argument("--resolution", type=int, default=512, help="pixels per side")
    parser.add_argument("--batch-size", type=int, default=4, help="images encoded at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--folder", type=Path, help="for photographs, to use them again")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cache.json"))
    asked = parser.parse_args(line)
    if asked.device == "auto":
        asked.device = "cuda" if torch.cuda.is_available() else "cpu"
    return asked


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    with tempfile.TemporaryDirectory() as aside:
        folder = (asked.folder or Path(aside)).absolute()
        name = f"photos-{asked.height}x{asked.width}-{asked.images}"
        images = photos.write(folder / name, asked.images, height=asked.height, width=asked.width)
        cases = [measure(asked, encoder, images) for encoder in asked.encoder]
    results = {"images": asked.images, "height": asked.height, "width": asked.width, "cases": cases}
    show(cases)
    report.write(asked.out, results)
    return results


def measure(asked: argparse.Namespace, name: str, images: Path) -> dict[str, Any]:
    """OTL and the work by hand in turns."""
    side, device = asked.resolution, torch.device(asked.device)
    paths = sorted(images.glob("*.jpg"))
    if name == "none":
        encoder = NoEncoder()
        by_hand: dict[str, Callable[[], Any]] = {
            "pillow": lambda: decode(paths, side, reduced=False),
            "pillow, reduced": lambda: decode(paths, side, reduced=True),
        }
    else:
        encoder = RealVae(device, narrow=name == "narrow")
        waiting = list(torch.stack(decode(paths, side, reduced=True)).split(asked.batch_size))
        by_hand = {"vae alone": lambda: encode(encoder, waiting)}
    contenders = {"otl": lambda: fill(encoder, images, side, asked.batch_size), **by_hand}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for run in contenders.values():  # once untimed: the files are then in the system's memory
        run()
    for _ in range(asked.rounds):
        for contender, run in contenders.items():
            seconds[contender].append(timed(run, device))
    return {"encoder": name, "resolution": side, "threads": THREADS, "contenders": summary(seconds, len(paths))}


def fill(encoder: NoEncoder, images: Path, side: int, batch_size: int) -> None:
    """The whole way of OTL, into an empty cache: scan, hash, decode, scale, crop, encode, write."""
    with tempfile.TemporaryDirectory() as cache:
        settings = Data(concepts={"photos": Concept(path=str(images))}, cache_dir=cache, encode_batch_size=batch_size)
        settings.buckets = False
        data = BucketedDataModule(settings, resolution=side, step=8, seed=0)
        data.setup()
        data.fill_cache(encoder, images=True, prompts=False)


def decode(paths: list[Path], side: int, *, reduced: bool) -> list[Tensor]:
    """Pillow by hand, in as many threads as OTL takes: [3, side, side] in -1..1 each."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda path: pixels(path, side, reduced=reduced), paths))


def pixels(path: Path, side: int, *, reduced: bool) -> Tensor:
    """Decode, scale the shorter side, crop the middle."""
    with Image.open(path) as image:
        scale = side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        if reduced:
            image.draft("RGB", size)
        scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (scaled.width - side) // 2, (scaled.height - side) // 2
    cut = np.array(scaled.crop((left, top, left + side, top + side)))
    return torch.from_numpy(cut).permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()


@torch.no_grad()
def encode(encoder: NoEncoder, waiting: list[Tensor]) -> list[Tensor]:
    """The encoder alone."""
    return [encoder.encode_image(batch.to(encoder.device)).cpu() for batch in waiting]


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of wall time and of processor time of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def summary(seconds: dict[str, list[tuple[float, float]]], images: int) -> dict[str, Any]:
    found = {}
    for name, rounds in seconds.items():
        found[name] = {"images_per_second": report.spread([images / wall for wall, _ in rounds])}
        if name != "otl":  # how much faster OTL is, by both clocks
            for number, clock in enumerate(("wall", "processor")):
                own, other = ([each[number] for each in times] for times in (seconds["otl"], rounds))
                found[name][f"otl_{clock}_ratio"] = report.ratios(other, own)
    return found


def show(cases: list[dict[str, Any]]) -> None:
    rows = []
    for case in cases:
        for name, found in case["contenders"].items():
            ratios = [report.show_spread(found[key]) for key in found if key.endswith("ratio")]
            row = [f"encoder {case['encoder']}, {case['resolution']} px: {name}"]
            rows.append([*row, report.show_spread(found["images_per_second"], ".2f"), *ratios])
    report.table("Into the cache", ["", "images/s", "OTL / it, wall", "OTL / it, processor"], rows)


if __name__ == "__main__":
    main()
