"""The dataset of a run: scanned once, cut into buckets, served from the cache in an order that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from otl.config import Data, Inpaint, MaskSource, PartialBatches, SettingsError
from otl.datamodules import filling, masks, views
from otl.datamodules.cache import Cache, image_key, masked_key, prompt_key
from otl.datamodules.files import content_hash
from otl.datamodules.layout import Layout, Place, layout
from otl.datamodules.loader import VALIDATION, Bucketed, Cached, Order, ResumableLoader, options
from otl.datamodules.rounds import Rounds, groups
from otl.datamodules.scan import scan
from otl.datamodules.texts import all_prompts
from otl.types import Encoder, Problem, Progress, Sample

LISTED = 10  # files named in an error


class BucketedDataModule(LightningDataModule):
    """Folders of images with captions.

    Args:
        data: the settings.
        resolution: pixels per side of the square with a bucket's area.
        step: sides of buckets are multiples of it, pixels.
        seed: of the order, captions, masks and noise.
        inpaint: how masks are made; None: there are none.
        hides: whether the model is shown what the masks leave of the images; else they only weigh the loss.
    """

    samples: list[Sample]  # to train on
    validation_samples: list[Sample]
    problems: list[Problem]  # what the scan found
    layout: Layout  # of `samples`
    validation_layout: Layout
    rounds: Rounds  # of `samples`

    def __init__(
        self,
        data: Data | DictConfig,
        *,
        resolution: int,
        step: int,
        seed: int,
        inpaint: Inpaint | None = None,
        hides: bool = True,
    ) -> None:
        super().__init__()
        self.data, self.resolution, self.step, self.seed = data, resolution, step, seed
        self.inpaint, self.hides = inpaint, hides and inpaint is not None
        self.scanned = False
        self.train_cached: Cached | None = None  # set by `fill_cache`
        self.validation_cached: Cached | None = None

    @property
    def cached(self) -> bool:
        """Whether the cache is to be filled before training."""
        return self.data.cache

    @property
    def caches_masked(self) -> bool:
        """Whether masked images are cached too: their masks come from files alone, and so never change."""
        return self.cached and self.hides and self.inpaint is not None and self.inpaint.masks == MaskSource.files

    def setup(self, stage: str | None = None) -> None:
        """Scan and lay out, once.

        Raises:
            SettingsError: the dataset cannot be trained on; lists all reasons.
        """
        if self.scanned:
            return
        samples, self.problems = scan(self.data, self.inpaint)
        fatal = [problem for problem in self.problems if problem.fatal]
        if fatal:
            raise SettingsError("\n".join(map(report, fatal)))
        self.samples = [sample for sample in samples if not sample.validation]
        self.validation_samples = [sample for sample in samples if sample.validation]
        self.layout, self.validation_layout = self._layout(self.samples), self._layout(self.validation_samples)
        self.rounds = rounds(self.layout, self.data, self.seed)
        self.scanned = True

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of each rank in an epoch."""
        return math.ceil(self.rounds.length / world_size)

    def fill_cache(self, encoder: Encoder, *, images: bool, prompts: bool, progress: Progress | None = None) -> None:
        """Encode what the cache lacks; from then on the loaders serve from it.

        Args:
            encoder: a family with its weights.
            images: whether latents are cached.
            prompts: whether conditioning is cached: not where a text encoder trains.
            progress: shows how far it is; None: nothing is shown.
        """
        cache = Cache(Path(self.data.cache_dir).expanduser())
        image_encoder = encoder.image_identity() if images else ""
        prompt_encoder = encoder.prompt_identity() if prompts else ""
        latents = self._image_keys(image_encoder, progress) if images else None
        conds = self._prompt_keys(prompt_encoder) if prompts else None
        masked = self._masked_keys(latents) if latents is not None and self.caches_masked else None
        pictures = self._pictures(latents) if latents is not None else []
        pictures += self._pictures(masked, masked=True) if masked is not None else []
        for share in self._shares():
            shared = {"batch_size": self.data.encode_batch_size, "progress": progress, "share": share}
            filling.fill_images(
                cache, encoder, pictures, identity=image_encoder, background=self.data.background, **shared
            )
            filling.fill_prompts(cache, encoder, conds or {}, identity=prompt_encoder, **shared)
        self._serve(cache, latents, conds, masked)

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = self._ranks()
        order = Order(lambda epoch: self.rounds.epoch(epoch, rank=rank, world_size=world_size))
        dataset = self._dataset(self.samples, self.layout, dropout=self.data.caption_dropout, cached=self.train_cached)
        return ResumableLoader(dataset, sampler=order, **options(self.data.workers))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The held-out images, always in the same order; an empty list where there are none."""
        if not self.validation_samples:
            return []
        rank, world_size = self._ranks()
        once = groups(self.validation_layout, {}, self.seed)
        stream = Rounds(once, batch_size=self.data.batch_size, partial=PartialBatches.keep, seed=self.seed)
        order = [(VALIDATION, draws) for _, draws in stream.epoch(0, rank=rank, world_size=world_size)]
        dataset = self._dataset(
            self.validation_samples, self.validation_layout, dropout=0.0, cached=self.validation_cached
        )
        return DataLoader(dataset, sampler=order, **options(self.data.workers))

    def _serve(
        self, cache: Cache, latents: list[str] | None, conds: dict[str, str] | None, masked: list[str] | None
    ) -> None:
        """From now on the loaders read the cache."""
        prompts = None if conds is None else cache.entries(conds.values())
        numbers = {text: number for number, text in enumerate(conds or ())}
        self.train_cached, self.validation_cached = (
            Cached(
                None if latents is None else cache.entries(latents[part]),
                prompts,
                numbers,
                None if masked is None else cache.entries(masked[part]),
            )
            for part in (slice(len(self.samples)), slice(len(self.samples), None))
        )

    def _layout(self, samples: list[Sample]) -> Layout:
        return layout(samples, resolution=self.resolution, step=self.step, buckets=self.data.buckets)

    def _dataset(self, samples: list[Sample], layout: Layout, *, dropout: float, cached: Cached | None) -> Bucketed:
        return Bucketed(
            samples,
            layout.places,
            seed=self.seed,
            seeds={name: each.seed for name, each in self.data.concepts.items() if each.seed is not None},
            background=self.data.background,
            caption_dropout=dropout,
            cached=cached,
            inpaint=self.inpaint,
            hides=self.hides,
        )

    def _ranks(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _shares(self) -> Iterator[tuple[int, int]]:
        """Every rank makes its part; then what it still lacks, where ranks do not share the folder."""
        rank, world_size = self._ranks()
        yield rank, world_size
        if world_size > 1:
            self.trainer.strategy.barrier("cache")
            yield 0, 1

    def _everything(self) -> list[tuple[Sample, Place]]:
        """The samples to train on, then those held out."""
        return [
            pair
            for each in (self.layout, self.validation_layout)
            for pair in zip(each.samples, each.places, strict=True)
        ]

    def _image_keys(self, identity: str, progress: Progress | None) -> list[str]:
        """The cache's key for each of `_everything`."""
        everything = self._everything()
        with ThreadPoolExecutor() as pool:
            reading = pool.map(lambda pair: content_hash(pair[0].path), everything)
            hashes = list(progress(reading, "images compared with the cache", len(everything)) if progress else reading)
        return [
            image_key(content, sample.size, views.plain(place), self.data.background, identity)
            for content, (sample, place) in zip(hashes, everything)
        ]

    def _prompt_keys(self, identity: str) -> dict[str, str]:
        """Caption -> key, of all that can come up."""
        texts = all_prompts(self.samples + self.validation_samples, self.data.caption_dropout)
        return {text: prompt_key(text, identity) for text in texts}

    def _masked_keys(self, image_keys: list[str]) -> list[str]:
        """The cache's key for the masked image of each of `_everything`."""
        assert self.inpaint is not None
        files = [sample.mask for sample, _ in self._everything()]
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(content_hash, [file for file in files if file is not None])
        return [masked_key(key, hash_, masks.VERSION, self.inpaint.fill) for key, hash_ in zip(image_keys, hashes)]

    def _pictures(self, keys: list[str], *, masked: bool = False) -> list[filling.Picture]:
        """What each key of `_everything` stands for."""
        return [
            filling.Picture(key, sample.path, views.plain(place), self._hole(sample) if masked else None)
            for key, (sample, place) in zip(keys, self._everything())
        ]

    def _hole(self, sample: Sample) -> filling.Hole:
        assert self.inpaint is not None and sample.mask is not None
        return filling.Hole(sample.mask, self.inpaint.fill)


def rounds(layout: Layout, data: Data | DictConfig, seed: int) -> Rounds:
    """The batches to train on."""
    drawn = groups(layout, data.concepts, seed)
    return Rounds(drawn, batch_size=data.batch_size, partial=data.partial_batches, seed=seed)


def report(problem: Problem) -> str:
    """A problem with the first of its files."""
    lines = [f"{problem.key}: {problem.message}", *(f"  {detail}" for detail in problem.details[:LISTED])]
    if len(problem.details) > LISTED:
        lines.append(f"  and {len(problem.details) - LISTED} more")
    return "\n".join(lines)
