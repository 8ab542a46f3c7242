"""Encodes into the cache what is not in it yet."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from otl.datamodules.cache import Cache
from otl.datamodules.shards import Origin
from otl.datamodules.wanted import Picture, Weights
from otl.formats.files import bytes_of
from otl.types import Encoder, Progress, Size

AHEAD = 3  # batches decoded while one is encoded
THREADS = os.cpu_count() or 1
TOGETHER = 64  # masks read at a time


def fill_images(
    cache: Cache,
    encoder: Encoder,
    pictures: Collection[Picture],
    *,
    identity: str,
    background: str,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Put latents. What is made is kept if it ends early; it ends at the first batch where there is no room for all.

    Args:
        cache: where to.
        encoder: of the images.
        pictures: those to encode, each once.
        identity: of the encoder.
        background: colour under transparent pixels.
        batch_size: images encoded at once.
        progress: shows how far it is; None: nothing is shown.
    """

    def made() -> Iterator[Picture]:
        pixels = sum(picture.view.bucket.area for picture in pictures)
        for number, (group, batch) in enumerate(decoded(by_bucket(pictures, batch_size), background)):
            with torch.no_grad():
                latents = encoder.encode_image(batch.to(encoder.device))
            if number == 0:
                cache.require_room(pixels * latents.nbytes // batch[:, 0].numel(), f"{len(pictures)} images")
            for picture, each in zip(group, latents):
                cache.put(picture.key, {"latents": each}, Origin(picture.kind, type(encoder).__name__, identity))
                yield picture

    _run(cache, made(), "images into the cache", len(pictures), progress)


def fill_weights(
    cache: Cache, encoder: Encoder, weights: Sequence[Weights], *, identity: str, progress: Progress | None
) -> None:
    """Put masks in the size of their latents, as far as these are there; the arguments are those of `fill_images`."""
    latents = cache.entries(each.latents for each in weights)
    there = [number for number in range(len(weights)) if latents.shard[number] >= 0]
    ready = [(weights[number], Size(*latents.shape(number, "latents")[-2:])) for number in there]
    origin = Origin("weights", type(encoder).__name__, identity)

    def made() -> Iterator[Weights]:
        with ThreadPoolExecutor(THREADS) as pool:
            for group in chunks(ready, TOGETHER):
                levels = pool.map(lambda pair: pair[0].levels(pair[1]), group)
                for (each, _), mask in zip(group, levels):
                    cache.put(each.key, {"mask": mask}, origin)
                    yield each

    _run(cache, made(), "masks into the cache", len(ready), progress)


def fill_prompts(
    cache: Cache,
    encoder: Encoder,
    prompts: dict[str, str],
    *,
    identity: str,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """The same for captions; `prompts` is key -> caption."""
    origin = Origin("prompt", type(encoder).__name__, identity)

    def made() -> Iterator[str]:
        for number, group in enumerate(chunks(list(prompts), batch_size)):
            with torch.no_grad():
                cond = encoder.encode_prompt([prompts[key] for key in group])
            if number == 0:
                cache.require_room(len(prompts) * bytes_of(cond.values()) // len(group), f"{len(prompts)} captions")
            for place, key in enumerate(group):
                cache.put(key, {name: tensor[place] for name, tensor in cond.items()}, origin)
                yield key

    _run(cache, made(), "captions into the cache", len(prompts), progress)


def by_bucket(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Batches of one size each, as soon as each is full: what lies together in an archive is read together."""
    buckets = defaultdict(list)
    for picture in pictures:
        group = buckets[picture.view.bucket]
        group.append(picture)
        if len(group) == batch_size:
            yield buckets.pop(picture.view.bucket)
    yield from buckets.values()


def chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def decoded(groups: Iterable[list[Picture]], background: str) -> Iterator[tuple[list[Picture], Tensor]]:
    """Each group with its pixels [B, 3, H, W], decoded in threads a little ahead of who asks."""
    pool = ThreadPoolExecutor(THREADS)
    waiting: deque[tuple[list[Picture], list[Future[Any]]]] = deque()
    try:
        for group in groups:
            waiting.append((group, [pool.submit(each.pixels, background) for each in group]))
            if len(waiting) > AHEAD:
                yield _stacked(*waiting.popleft())
        while waiting:
            yield _stacked(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(group: list[Picture], futures: list[Future[Any]]) -> tuple[list[Picture], Tensor]:
    return group, torch.stack([future.result() for future in futures])


def _run(cache: Cache, made: Iterator[Any], what: str, count: int, progress: Progress | None) -> None:
    """Go through all entries and show them."""
    try:
        for _ in made if progress is None or not count else progress(made, what, count):
            pass
    finally:
        cache.flush()
