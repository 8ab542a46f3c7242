"""The memory of a run over very many samples, all of them in the cache.

    python -m benchmarks.many --samples 1000000 --workers 2

Samples as a scan of a store gives them, each with a URL, a size and a caption of its own, go through OTL's whole data
module: buckets, rounds, keys, the cache's record and its check that nothing is missing, the loader and its workers, an
epoch's order. Lightning trains one layer on them for an epoch. Simulated are the pictures and their encoding: entries
are small, and were put into the cache beforehand. After each tenth of the epoch it is looked at how much memory the
main process and the workers take (PSS: what several share is counted once, by equal parts).
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks import report
from otl.config import Data
from otl.datamodules.bucketed import BucketedDataModule
from otl.datamodules.cache import Cache, prompt_key
from otl.datamodules.files import Remote, content_hash
from otl.datamodules.samples import Samples
from otl.datamodules.shards import Origin
from otl.datamodules.wanted import wanted
from otl.types import Batch, Cond, Sample, Size

SHAPES = [Size(512, 512), Size(512, 768), Size(768, 512), Size(640, 512), Size(896, 512), Size(512, 1024)]  # pixels
LATENTS, HIDDEN = (4, 2, 2), (2, 4)  # of an entry
TOGETHER = 100_000  # entries that are put at a time
PARTS = 10  # of the epoch
MIB = 2**20


class Small:
    """Makes nothing: everything is in the cache."""

    device = torch.device("cpu")

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise AssertionError("an image is not in the cache")

    def encode_prompt(self, captions: list[str]) -> Cond:
        raise AssertionError(f"{captions[0]} is not in the cache")

    def image_identity(self) -> str:
        return "benchmark"

    def prompt_identity(self) -> str:
        return "benchmark"


class OneLayer(LightningModule):
    """The least that trains on latents and conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN[-1], LATENTS[0])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.latents is not None and batch.cond is not None and batch.noise is not None
        predicted = self.layer(batch.cond["hidden"].mean(1))[:, :, None, None]
        return (batch.weight * (predicted - batch.noise + batch.latents).square().mean((1, 2, 3))).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Watch(Callback):
    """What memory there is in between, and which samples came."""

    def __init__(self, samples: int) -> None:
        self.seen = torch.zeros(samples, dtype=torch.int32)
        self.held: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seen[batch.index] += 1
        if len(self.held) < PARTS * (batch_idx + 1) // int(trainer.num_training_batches):
            self.held.append(held())


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the cache is made")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/many.json"))
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=asked.folder) as aside:
        results = run(asked.samples, asked.batch_size, asked.workers, Path(aside))
    show(results)
    report.write(asked.out, {"batch_size": asked.batch_size, "workers": asked.workers, **results})
    return results


def run(samples: int, batch_size: int, workers: int, folder: Path) -> dict[str, Any]:
    """An epoch, and what was held at each stage of it."""
    bare = held()
    settings = Data(path="s3://bucket/photos", cache_dir=str(folder), batch_size=batch_size, workers=workers)
    data = BucketedDataModule(settings, resolution=512, step=64, seed=0)
    data.arrange(Samples(pictures(samples)))
    gc.collect()
    placed = held()
    put_all(data, Cache(folder))
    begun = time.perf_counter()
    data.fill_cache(Small(), images=True, prompts=True)
    opening = time.perf_counter() - begun
    gc.collect()
    served, peak = held(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    watch, begun = Watch(samples), time.perf_counter()
    nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[watch], use_distributed_sampler=False, **nothing)
    trainer.fit(OneLayer(), train_dataloaders=data.train_dataloader())
    seconds = time.perf_counter() - begun
    assert (watch.seen == 1).all(), "a sample came not once in the epoch"
    before = {"bare": bare, "placed": placed, "served": served}
    rates = {"opening_seconds": opening, "samples_per_second": samples / seconds, "peak_bytes_before": peak}
    return {"samples": samples, **rates, "before": before, "during": watch.held}


def pictures(count: int) -> Iterator[Sample]:
    """As a scan of a store finds them."""
    for number in range(count):
        url = f"s3://bucket/photos/{number // 1000:04d}/image-{number:07d}.jpg"
        caption = f"a made-up picture, number {number}, of a dog on a beach in the evening"
        length = 100_000 + number % 1000
        yield Sample(Remote(url, length, f"{number:032x}"), SHAPES[number % len(SHAPES)], [caption], bytes=length)


def put_all(data: BucketedDataModule, cache: Cache) -> None:
    """An entry for all that the samples need; the encoder says so if one is lacking."""
    identity, latents, cond = Small().image_identity(), torch.randn(LATENTS), torch.randn(HIDDEN)
    contents = [content_hash(sample.path) for sample in data.samples]
    common = {"seed": data.seed, "seeds": {}, "background": data.data.background}
    images = wanted(data.variations, contents, identity=identity, fill=None, weighs=False, **common).keys
    prompts = [prompt_key(sample.captions[0], identity) for sample in data.samples]
    for kind, keys, tensors in (("image", images, {"latents": latents}), ("prompt", prompts, {"hidden": cond})):
        for number, key in enumerate(keys, start=1):
            cache.put(key, tensors, Origin(kind, Small.__name__, identity))
            if number % TOGETHER == 0:
                cache.flush()
    cache.flush()


def held() -> dict[str, int]:
    """Bytes of the main process, of its workers, and of all together."""
    import psutil

    own = psutil.Process()
    main, *workers = (each.memory_full_info() for each in (own, *own.children()))
    return {
        "main": main.pss,
        "workers": sum(each.pss for each in workers),
        "workers_own": sum(each.uss for each in workers),
        "together": main.pss + sum(each.pss for each in workers),
    }


def show(results: dict[str, Any]) -> None:
    named = {**results["before"], **{f"after {n}/{PARTS}": each for n, each in enumerate(results["during"], start=1)}}
    rows = [[name, *(f"{each / MIB:.0f}" for each in found.values())] for name, found in named.items()]
    columns = ["MiB", "main process", "workers", "of that, theirs alone", "together"]
    report.table(f"{results['samples']} samples, {results['samples_per_second']:.0f}/s", columns, rows)


if __name__ == "__main__":
    main()
