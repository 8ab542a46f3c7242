"""Cached samples per second from the loader.

    python -m benchmarks.loader --samples 1000 --batch-size 4 --workers 2

A cache as SDXL's is at 1024 pixels (latents 4 x 128 x 128 in fp32, hidden states 77 x 2048 and pooled 1280 in
bf16), read by OTL's whole data module: order, captions, keys, noise, stacking, and the way from the workers to the
main process. In turns with it a loader by hand: one safetensors file a sample, torch's DataLoader, as many workers,
random order, noise without a seed. Samples per second by wall time, and of two cores by the processor time of all
processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import report
from otl.config import Concept, Data
from otl.datamodules.bucketed import BucketedDataModule
from otl.datamodules.loader import ResumableLoader
from otl.types import Cond

CORES = 2  # whose processor time the rate is of
SIDE = 64  # of the images, pixels: they are not what is measured


class Sdxl:
    """Numbers of the shapes that SDXL caches."""

    device = torch.device("cpu")

    def __init__(self, latents: int, tokens: int) -> None:
        self.side, self.tokens = latents, tokens

    def encode_image(self, pixels: Tensor) -> Tensor:
        return torch.randn(len(pixels), 4, self.side, self.side)

    def encode_prompt(self, captions: list[str]) -> Cond:
        hidden = torch.randn(len(captions), self.tokens, 2048).bfloat16()
        return {"hidden": hidden, "pooled": torch.randn(len(captions), 1280).bfloat16()}

    def image_identity(self) -> str:
        return "benchmark"

    def prompt_identity(self) -> str:
        return "benchmark"


class Files(Dataset[dict[str, Tensor]]):
    """By hand: one file a sample."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tensors = load_file(self.paths[index])
        return tensors | {"noise": torch.randn_like(tensors["latents"])}


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--samples", type=int, default=1000, help="of the speed")
    parser.add_argument("--latents", type=int, default=128, help="their side")
    parser.add_argument("--tokens", type=int, default=77)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the caches are made")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/loader.json"))
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=asked.folder) as aside:
        folder = Path(aside)
        results = {"speed": speed(asked, folder)}
    show(results)
    report.write(asked.out, {"batch_size": asked.batch_size, "workers": asked.workers, **results})
    return results


def speed(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """OTL and the loader by hand in turns, an epoch each."""
    own, by_hand = otl_loader(asked, folder), plain_loader(asked, folder)
    loaders: dict[str, Iterable[Any]] = {"otl": own, "by hand": by_hand}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(asked.rounds + 1):
        for name, each in loaders.items():
            seconds[name].append(timed(lambda each=each: consume(each)))
    found = {}
    for name, rounds in seconds.items():
        walls, processors = zip(*rounds[1:])  # in the first the workers start
        found[name] = {
            "samples_per_second": report.spread([asked.samples / wall for wall in walls]),
            "samples_per_second_of_two_cores": report.spread([CORES * asked.samples / each for each in processors]),
        }
    for number, clock in enumerate(("wall", "processor")):
        other, mine = ([each[number] for each in seconds[name][1:]] for name in ("by hand", "otl"))
        found["by hand"][f"otl_{clock}_ratio"] = report.ratios(other, mine)
    return found


def otl_loader(asked: argparse.Namespace, folder: Path) -> ResumableLoader:
    images = folder / "images"
    images.mkdir()
    for number in range(asked.samples):
        Image.fromarray(np.full((SIDE, SIDE, 3), number % 256, dtype=np.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a made-up picture, number {number}")
    settings = Data(concepts={"images": Concept(path=str(images))}, cache_dir=str(folder / "cache"))
    settings.batch_size, settings.workers, settings.encode_batch_size = asked.batch_size, asked.workers, 16
    data = BucketedDataModule(settings, resolution=SIDE, step=8, seed=0)
    data.setup()
    data.fill_cache(Sdxl(asked.latents, asked.tokens), images=True, prompts=True)
    return data.train_dataloader()


def plain_loader(asked: argparse.Namespace, folder: Path) -> DataLoader[dict[str, Tensor]]:
    encoder, paths = Sdxl(asked.latents, asked.tokens), []
    for number in range(asked.samples):
        path = folder / "files" / f"{number}.safetensors"
        path.parent.mkdir(exist_ok=True)
        cond = {name: tensor[0] for name, tensor in encoder.encode_prompt([""]).items()}
        save_file({"latents": encoder.encode_image(torch.empty(1))[0], **cond}, path)
        paths.append(path)
    options = {"num_workers": asked.workers, "persistent_workers": asked.workers > 0}
    return DataLoader(Files(paths), batch_size=asked.batch_size, shuffle=True, **options)


def consume(loader: Iterable[Any]) -> None:
    for _ in loader:
        pass


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall time, and of processor time of this process and its workers, which are still there."""
    wall, processor = time.perf_counter(), processor_seconds()
    run()
    return time.perf_counter() - wall, processor_seconds() - processor


def processor_seconds() -> float:
    """Of this process and its living children."""
    import psutil

    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(each.cpu_times()[:2]) for each in children)


def show(results: dict[str, Any]) -> None:
    rows = []
    for name, found in results["speed"].items():
        rates = [report.show_spread(found[key], ".0f") for key in found if key.startswith("samples")]
        rows.append([name, *rates, *(report.show_spread(found[key]) for key in found if key.endswith("ratio"))])
    columns = ["", "samples/s, wall", f"samples/s of {CORES} cores", "OTL / it, wall", "OTL / it, processor"]
    report.table("The loader", columns, rows)


if __name__ == "__main__":
    main()
