"""Batches from the cache or the files, and a DataLoader that goes on exactly where it stopped."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from otl import rng
from otl.config import Inpaint, RunEnded
from otl.datamodules import images, masks
from otl.datamodules.cache import Cache, prompt_key
from otl.datamodules.entries import Entries
from otl.datamodules.rounds import Draw, Epoch, Request
from otl.datamodules.texts import Texts
from otl.datamodules.variations import Variations
from otl.datamodules.views import View
from otl.types import Batch, Cond, Sample

KEPT = 2**16  # captions whose numbers are kept
AHEAD = 4  # batches from the cache that are made at a time where there are no workers
VALIDATION = "validation"  # in the place of the round: validation is the same every time


@dataclass
class Cached:
    """What the cache holds for a dataset."""

    cache: Cache
    latents: Entries | None  # of each sample all variations; None: pixels are served
    prompts: Entries | None  # one for each caption that can come up; None: captions alone are served
    prompt_encoder: str  # its identity, from which with a caption the key follows
    masked: Entries | None  # one for each of the latents with its mask over it; None: not cached
    weights: Entries | None  # the mask of each of the latents in their size; None: masks are read from their files
    marks: np.ndarray  # [samples] int64, a number that depends on the seed and on what the sample shows
    numbers: dict[str, int] = field(default_factory=dict)  # caption -> its number among the prompts, of the last ones

    def number_of(self, text: str) -> int:
        """Where a caption's conditioning is among the prompts: one at a time is found slowly, so it is kept."""
        if text not in self.numbers:
            if len(self.numbers) >= KEPT:
                self.numbers.clear()
            (self.numbers[text],) = self.prompts.numbers([prompt_key(text, self.prompt_encoder)])
        return self.numbers[text]


class Bucketed(Dataset[Batch]):
    """Samples with their views; asked for a whole batch at a time.

    Args:
        variations: the samples, and what may be shown of each.
        seed: of the run.
        seeds: by concept, of those that have one of their own.
        background: colour under transparent pixels.
        texts: what the images are called.
        cached: where latents and conditioning come from; None: pixels and captions alone.
        inpaint: how masks are made; None: there are none.
        hides: whether the model is shown what the masks leave of the images; else they only weigh the loss.
    """

    def __init__(
        self,
        variations: Variations,
        *,
        seed: int,
        seeds: dict[str, int],
        background: str,
        texts: Texts,
        cached: Cached | None,
        inpaint: Inpaint | None = None,
        hides: bool = True,
    ) -> None:
        self.inpaint, self.hides = inpaint, hides
        self.samples, self.variations, self.seed, self.seeds = variations.samples, variations, seed, seeds
        self.background, self.texts, self.cached = background, texts, cached

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def ahead(self) -> int:
        """How many batches `in_turn` makes at a time: with pixels, which take time and memory, one."""
        only_reads = self.cached is not None and self.cached.latents is not None and self.inpaint is None
        return AHEAD if only_reads else 1

    def __getitem__(self, request: Request) -> Batch:
        round_number, draws = request
        samples = [self.samples[index] for index, _ in draws]
        keys = [rng.key(self.seed_of(index), round_number, index, draw) for index, draw in draws]
        texts = [self.texts.of(sample, key) for sample, key in zip(samples, keys)]
        shown, numbers = self.chosen(round_number, draws, keys)
        latents, masked = self.latents(numbers), self.masked(numbers)
        needs_pixels = latents is None or (self.inpaint is not None and self.hides and masked is None)
        # Validation draws noise of its own, for several timesteps.
        drawn = latents is not None and round_number != VALIDATION
        # Columns of one tensor: next to a network each tensor that is made costs far more than its numbers.
        table = torch.tensor([columns(*each) for each in zip(draws, keys, samples, shown)])
        return Batch(
            index=table[:, 0],
            key=table[:, 1],
            captions=texts,
            original_size=table[:, 2:4],
            crop=table[:, 4:6],
            target_size=table[:, 6:8],
            weight=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
            pixels=self.pixels(samples, shown) if needs_pixels else None,
            latents=latents,
            cond=self.cond(texts),
            prior=torch.tensor([sample.prior for sample in samples]) if any(s.prior for s in samples) else None,
            noise=rng.normals(table[:, 1], tuple(latents.shape[1:]), "noise") if drawn else None,
            mask=self.masks(samples, shown, keys, numbers),
            masked=masked,
        )

    def seed_of(self, index: int) -> int:
        return self.seeds.get(self.samples.concept(index), self.seed)

    def chosen(self, round_number: int | str, draws: list[Draw], keys: list[int]) -> tuple[list[View], list[int]]:
        """What of each image is shown this time, and the numbers of these variations among all that are cached."""
        views = self.variations
        if self.cached is None or self.cached.latents is None:
            return [views.fresh(index, key) for (index, _), key in zip(draws, keys)], []
        marks = self.cached.marks[[index for index, _ in draws]].tolist()
        numbers = [views.number(index, round_number, draw, mark) for (index, draw), mark in zip(draws, marks)]
        shown = [views.view(index, number, mark) for (index, _), number, mark in zip(draws, numbers, marks)]
        return shown, [index * views.count + number for (index, _), number in zip(draws, numbers)]

    def pixels(self, samples: list[Sample], shown: list[View]) -> Tensor:
        """[B, 3, H, W] in -1..1."""
        return torch.stack([images.pixels(sample.path, view, self.background) for sample, view in zip(samples, shown)])

    def masks(self, samples: list[Sample], shown: list[View], keys: list[int], numbers: list[int]) -> Tensor | None:
        """[B, 1, H, W] float32; another one every time where they are generated. Those that hide are of 0 and 1.

        Cached ones are [B, 1, h, w], as the loss would make them.
        """
        if self.inpaint is None:
            return None
        if self.cached is not None and self.cached.weights is not None:
            return self.cached.weights.read(numbers)["mask"]
        each = zip(samples, shown, keys)
        soft = not self.hides
        return torch.stack([masks.mask(sample, view, key, self.inpaint, soft=soft) for sample, view, key in each])

    def latents(self, numbers: list[int]) -> Tensor | None:
        """[B, C, h, w] float32 from the cache."""
        return latents_of(self.cached and self.cached.latents, numbers)

    def masked(self, numbers: list[int]) -> Tensor | None:
        """[B, C, h, w] float32 from the cache: latents of the masked pixels, where masks never change."""
        return latents_of(self.cached and self.cached.masked, numbers)

    def cond(self, texts: list[str]) -> Cond | None:
        """The conditioning of each caption, stacked."""
        if self.cached is None or self.cached.prompts is None:
            return None
        return self.cached.prompts.read([self.cached.number_of(text) for text in texts])


def columns(draw: Draw, key: int, sample: Sample, view: View) -> tuple[int, ...]:
    """Whole numbers of a batch's row: number of the sample, key, original size, crop, target size."""
    top, left = view.crop
    return draw[0], key, *sample.size, max(top, 0), max(left, 0), *view.bucket  # a turned crop may reach beyond


def latents_of(entries: Entries | None, numbers: list[int]) -> Tensor | None:
    """[B, C, h, w] float32; None where nothing is cached."""
    return None if entries is None else entries.read(numbers)["latents"].float()


class Order(Sampler[Request]):
    """The batches of an epoch, and the place in it, which nobody else counts: there is no `set_epoch` for Lightning.

    Args:
        epochs: number of an epoch -> its batches, of this rank.
    """

    def __init__(self, epochs: Callable[[int], Epoch]) -> None:
        self.epochs = epochs
        self.epoch, self.delivered = 0, 0
        self.length = len(epochs(0))  # the same every epoch

    def begin(self) -> None:
        """Go on where it stopped, which at an epoch's end is the next one."""
        if self.delivered >= self.length:
            self.epoch, self.delivered = self.epoch + 1, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Request]:
        # Not a generator: what is loaded ahead must not follow what happens meanwhile.
        return iter(self.epochs(self.epoch)[self.delivered :])


class WorkerDied(RunEnded):
    """A process that loads batches is dead, which no error of its own has said."""

    on_all_ranks = False

    def __init__(self, error: RuntimeError, workers: int) -> None:
        super().__init__(
            f"one of the data.workers={workers} processes that load batches was killed, mostly because the memory was "
            f"full ({str(error).splitlines()[0]}). Go on with resume=auto, and with fewer data.workers: any number "
            "gives the same result"
        )


class Loader(DataLoader[Batch]):
    """Its workers may die, and it is told between two batches."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if not self.num_workers and not self.pin_memory:  # the same by a shorter way: the dataset makes whole batches
            return in_turn(self.dataset, iter(self.sampler))
        before, fresh = signal.getsignal(signal.SIGCHLD), self._iterator is None
        with deaths_told(self.num_workers):
            batches = super().__iter__()
        if self.num_workers and fresh:
            atexit.register(end_workers, weakref.ref(batches))
        if signal.getsignal(signal.SIGCHLD) is not before:
            # torch's would raise an error at whatever line the main process is just then, also while a step is written
            # down. Whoever asks for the next batch is told too.
            signal.signal(signal.SIGCHLD, before)
        return self._told(batches)

    def _told(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        with deaths_told(self.num_workers):
            yield from batches


def end_workers(batches: weakref.ref[Any]) -> None:
    """The processes of an iterator that is still there when this process exits, as an error's traceback keeps it: else
    they are ended by SIGTERM, which `deaf` takes for a cluster's, and waited for. torch does so where it pins memory.
    """
    if (running := batches()) is not None:
        running._shutdown_workers()


def in_turn(dataset: Bucketed, requests: Iterator[Request]) -> Iterator[Batch]:
    """Batches without workers, a few made at a time: after a network's step none of their code and data is in the
    processor's caches any more, and fetching it takes longer than the rest (docs/performance.md)."""
    while made := [dataset[request] for request in islice(requests, dataset.ahead)]:
        yield from made


@contextmanager
def deaths_told(workers: int) -> Iterator[None]:
    """Raises WorkerDied: in the place of torch's error, and not of one that a worker itself raised."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerDied(error, workers) from error


class ResumableLoader(Loader):
    """Its state is the epoch and the number of batches delivered; the rest follows from the order.

    torchdata's StatefulDataLoader is off by one epoch at an epoch's end.
    """

    sampler: Order
    dataset: Bucketed

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.sampler.begin()
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.sampler.delivered += 1
            if self.dataset.cached is not None:
                self.dataset.cached.cache.beat()
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "delivered": self.sampler.delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.epoch, self.sampler.delivered = state["epoch"], state["delivered"]


def options(workers: int, device: torch.device) -> dict[str, Any]:
    """How both loaders load: the dataset makes whole batches itself.

    Args:
        device: where the batches go; a run on the CPU must not occupy a GPU beside it, as pinned memory does.
    """
    return {
        "batch_size": None,
        "collate_fn": whole,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": deaf,
        "generator": torch.Generator(),  # each pass draws a seed for its workers: not from what dropout draws from
    }


def deaf(_: int) -> None:
    """Ctrl-C reaches every process of the terminal, and a cluster's signals every process of the job; only the main one
    decides what they mean. Where it ends a worker that hangs, by SIGTERM, that has a minute left."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def whole(batch: Batch) -> Batch:
    """A batch is one already."""
    return batch
