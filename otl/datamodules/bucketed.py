"""The dataset of a run: scanned once, cut into buckets, served from the cache in an order that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from otl.config import Data, Inpaint, MaskSource, PartialBatches, SettingsError
from otl.datamodules import filling, shapes, uses, views
from otl.datamodules.cache import Cache, prompt_key
from otl.datamodules.entries import Entries
from otl.datamodules.files import content_hash
from otl.datamodules.layout import Layout, layout
from otl.datamodules.loader import VALIDATION, Bucketed, Cached, Loader, Order, ResumableLoader, options
from otl.datamodules.rounds import Rounds, groups
from otl.datamodules.samples import Samples
from otl.datamodules.scan import scan
from otl.datamodules.texts import Texts
from otl.datamodules.variations import Variations, augments
from otl.datamodules.wanted import Picture, Wanted, Weights, wanted
from otl.types import Encoder, Problem, Progress, Sample
from otl.wording import printable

LISTED = 10  # files named in an error


class BucketedDataModule(LightningDataModule):
    """Folders of images with captions.

    Args:
        data: the settings.
        resolution: pixels per side of the square with a bucket's area, where the settings name none.
        step: sides of buckets are multiples of it, pixels.
        seed: of the order, captions, masks and noise.
        inpaint: how masks are made; None: there are none.
        hides: whether the model is shown what the masks leave of the images; else they only weigh the loss.
    """

    samples: Samples  # to train on; an image at several resolutions is there several times
    validation_samples: Samples
    problems: list[Problem]  # what is wrong with the images, and which are left out
    layout: Layout  # of `samples`
    validation_layout: Layout
    rounds: Rounds  # of `samples`
    validation_rounds: Rounds  # the first is every validation
    variations: Variations  # of `samples`
    validation_variations: Variations
    purpose = ""  # of what the cache is used for, where that is not training: such a use is recorded beside it

    def __init__(
        self,
        data: Data,
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
        self.scanned: tuple[Samples, list[Problem]] | None = None  # what the scan found
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
        if self.scanned is not None:
            return
        found, problems = scan(self.data, self.inpaint)
        self.scanned = Samples(found), problems
        require_sound(problems)
        self.arrange(self.scanned[0])
        self.problems = problems + placing(self.layout, self.validation_layout)
        require_sound(self.problems)

    def arrange(self, samples: Sequence[Sample]) -> None:
        """Give the samples to train on, and those held out, their places and turns."""
        where = {"resolution": self.resolution, "step": self.step, "seed": self.seed}
        self.layout, self.validation_layout = laid_out(samples, self.data, **where)
        self.samples, self.validation_samples = self.layout.samples, self.validation_layout.samples
        self.rounds = rounds(self.layout, self.data, self.seed)
        once = groups(self.validation_layout, {}, self.seed)
        kept = PartialBatches.keep
        self.validation_rounds = Rounds(once, batch_size=self.data.batch_size, partial=kept, seed=self.seed)
        varied = augments(self.data)
        settled = {concept: views.settled(augment) for concept, augment in varied.items()}
        self.variations = Variations(self.layout, varied, self.data.image_variations, self.rounds.pace)
        self.validation_variations = Variations(self.validation_layout, settled)

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of each rank in an epoch."""
        return math.ceil(self.rounds.length / world_size)

    def fills(self, number: int) -> bool:
        """Whether a batch is only there because ranks take equally many, and has been another rank's before.

        Args:
            number: of the batch in this rank's epoch, or in its validation, from 0.
        """
        rank, world_size = self._ranks()
        validating = self.trainer is not None and self.trainer.validating
        length = (self.validation_rounds if validating else self.rounds).length
        return number * world_size + rank >= length

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
        contents = self._contents(progress) if images else []
        entries = self._wanted(contents, image_encoder) if images else []
        conds = self._prompt_keys(prompt_encoder) if prompts else None
        pictures = [picture for each in entries for picture in each.pictures + each.masked]
        weights = [mask for each in entries for mask in each.weights]
        keys = [*(key for each in entries for key in each.keys), *(conds or {}).values()]
        resolutions = shapes.shown_at(self.data, self.resolution, self.step)
        dataset = uses.described(self.data, resolutions, type(encoder).__name__) + self.purpose
        cache.record(dataset, keys)
        for missing in self._shares(cache, keys):
            shared = {"batch_size": self.data.encode_batch_size, "progress": progress}
            lacking = {picture.key: picture for picture in pictures if picture.key in missing}
            texts = {key: text for text, key in (conds or {}).items() if key in missing}
            filling.fill_images(
                cache, encoder, lacking.values(), identity=image_encoder, background=self.data.background, **shared
            )
            lacking_weights = list({mask.key: mask for mask in weights if mask.key in missing}.values())
            filling.fill_weights(cache, encoder, lacking_weights, identity=image_encoder, progress=progress)
            filling.fill_prompts(cache, encoder, texts, identity=prompt_encoder, **shared)
        self._serve(cache, entries, conds, prompt_encoder)

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = self._ranks()
        order = Order(lambda epoch: self.rounds.epoch(epoch, rank=rank, world_size=world_size))
        dataset = self._dataset(self.variations, training=True, cached=self.train_cached)
        return ResumableLoader(dataset, sampler=order, **options(self.data.workers, self._device()))

    def val_dataloader(self) -> Loader | list[Any]:
        """The held-out images, always in the same order; an empty list where there are none."""
        if not self.validation_samples:
            return []
        rank, world_size = self._ranks()
        epoch = self.validation_rounds.epoch(0, rank=rank, world_size=world_size)
        order = [(VALIDATION, draws) for _, draws in epoch]
        dataset = self._dataset(self.validation_variations, training=False, cached=self.validation_cached)
        return Loader(dataset, sampler=order, **options(self.data.workers, self._device()))

    def predict_dataloader(self) -> Loader | list[Any]:
        """As in validation; Lightning asks for it before any hook, so that what training does first is done here."""
        self.trainer.lightning_module.on_fit_start()
        return self.val_dataloader()

    def _serve(self, cache: Cache, wanted: list[Wanted], conds: dict[str, str] | None, prompt_encoder: str) -> None:
        """From now on the loaders read the cache."""
        prompts = None if conds is None else cache.entries(conds.values())

        def entries(made: Sequence[Picture | Weights]) -> Entries | None:
            return cache.entries(each.key for each in made) if made else None

        def cached(each: Wanted) -> Cached:
            latents, masked, weights = entries(each.pictures), entries(each.masked), entries(each.weights)
            marks = np.array(each.marks, dtype=np.int64)
            return Cached(cache, latents, prompts, prompt_encoder, masked, weights, marks)

        self.train_cached, self.validation_cached = map(cached, wanted or [Wanted(), Wanted()])

    def _dataset(self, variations: Variations, *, training: bool, cached: Cached | None) -> Bucketed:
        return Bucketed(
            variations,
            seed=self.seed,
            seeds=self._seeds(),
            background=self.data.background,
            texts=self._texts(training=training, cached=cached is not None and cached.prompts is not None),
            cached=cached,
            inpaint=self.inpaint,
            hides=self.hides,
        )

    def _seeds(self) -> dict[str, int]:
        """By concept, of those that have one of their own."""
        return {name: each.seed for name, each in self.data.concepts.items() if each.seed is not None}

    def _ranks(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _device(self) -> torch.device:
        """Where the batches go."""
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    def _shares(self, cache: Cache, keys: list[str]) -> Iterator[set[str]]:
        """Keys of what this rank makes: its part; then what it still lacks, where ranks do not share the folder."""
        rank, world_size = self._ranks()
        missing = cache.missing(keys)
        if world_size > 1:
            self.trainer.strategy.barrier("missing")  # all have looked before one writes: their parts are of one list
        yield set(missing[rank::world_size])
        if world_size > 1:
            self.trainer.strategy.barrier("filled")
            yield set(cache.missing(keys))

    def _wanted(self, contents: list[str], identity: str) -> list[Wanted]:
        """The entries of the samples to train on, and of those held out."""
        fill = self.inpaint.fill if self.inpaint is not None and self.caches_masked else None
        weighs = self.inpaint is not None and not self.hides
        options = {"background": self.data.background, "identity": identity, "fill": fill, "weighs": weighs}
        options |= {"seed": self.seed, "seeds": self._seeds()}
        count = len(self.samples)
        return [
            wanted(self.variations, contents[:count], **options),
            wanted(self.validation_variations, contents[count:], **options),
        ]

    def _contents(self, progress: Progress | None) -> list[str]:
        """A hash of each file, those held out behind the others."""
        samples = [*self.samples, *self.validation_samples]
        with ThreadPoolExecutor() as pool:
            reading = pool.map(lambda sample: content_hash(sample.path), samples)
            return list(progress(reading, "images compared with the cache", len(samples)) if progress else reading)

    def _prompt_keys(self, identity: str) -> dict[str, str]:
        """Caption -> key, of all that can come up."""
        texts = self._texts(training=True, cached=True).distinct(self.samples)
        texts |= self._texts(training=False, cached=True).distinct(self.validation_samples)
        return {text: prompt_key(text, identity) for text in sorted(texts)}

    def _texts(self, *, training: bool, cached: bool) -> Texts:
        return Texts.of_dataset(self.data, seed=self.seed, training=training, cached=cached)


def laid_out(samples: Sequence[Sample], data: Data, *, resolution: int, step: int, seed: int) -> tuple[Layout, Layout]:
    """The images to train on and those held out, each with its places: see `layout`."""
    samples = Samples.of(samples)
    apart = np.array([sample.validation for sample in samples], dtype=bool)
    train, held_out = samples.take(np.flatnonzero(~apart)), samples.take(np.flatnonzero(apart))
    where = {"resolution": resolution, "step": step, "seed": seed}
    return layout(train, data, **where), layout(held_out, data, **where)


def placing(train: Layout, held_out: Layout) -> list[Problem]:
    """Which images have no place; fatal where none is left to train on."""
    found = train.problems + held_out.problems
    if train.samples or not train.problems:
        return found
    keys = " and ".join(problem.key for problem in train.problems)
    return [*found, Problem("data", f"no image is left to train on: change {keys}, or add larger images")]


def require_sound(problems: list[Problem]) -> None:
    """Raises SettingsError: some of the problems are fatal."""
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise SettingsError("\n".join(map(report, fatal)))


def rounds(layout: Layout, data: Data, seed: int) -> Rounds:
    """The batches to train on."""
    drawn = groups(layout, data.concepts, seed)
    return Rounds(drawn, batch_size=data.batch_size, partial=data.partial_batches, seed=seed)


def report(problem: Problem) -> str:
    """A problem with the first of its files."""
    lines = [f"{problem.key}: {problem.message}", *(f"  {printable(detail)}" for detail in problem.details[:LISTED])]
    if len(problem.details) > LISTED:
        lines.append(f"  and {len(problem.details) - LISTED} more: task=plan lists all in plan.json")
    return "\n".join(lines)
