"""Settings of the dataset that make no sense together, as far as it can be told before the images are looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from otl.config import Concept, ConceptType, Problem
from otl.wording import show

SMALLEST_SIDE = 64  # pixels, of a bucket
OF_TRAINING = ("repeats", "samples", "loss_weight")  # fields of a concept that its validation images have no use for


def of_data(data: dict[str, Any]) -> Iterator[Problem]:
    """What would have no effect, or contradicts something else."""
    concepts: dict[str, dict[str, Any]] = data.get("concepts") or {}
    if data.get("path") and "data" in concepts:
        yield Problem("data.concepts.data", "the images of data.path go by this name: give the concept another one")
    for name, concept in concepts.items():
        yield from _of_concept(f"data.concepts.{name}", concept)
    resolutions = {"data.resolution": data.get("resolution")}
    resolutions |= {f"data.concepts.{name}.resolution": concept.get("resolution") for name, concept in concepts.items()}
    yield from _of_resolutions(data, {key: value for key, value in resolutions.items() if value is not None})
    yield from _of_buckets(data)


def _of_resolutions(data: dict[str, Any], asked: dict[str, Any]) -> Iterator[Problem]:
    """One resolution or several, of the dataset and of concepts."""
    lists = {key: value for key, value in asked.items() if isinstance(value, list)}
    for key, value in asked.items():
        if data.get("bucket_sizes"):
            yield Problem(key, f"{show(value)} would have no effect: data.bucket_sizes says what the buckets are")
        elif value == []:
            yield Problem(key, "the list is empty: give a number of pixels, several, or null")
    for key, value in lists.items():
        if twice := [each for each, count in Counter(map(str, value)).items() if count > 1]:
            yield Problem(key, f"{twice[0]} is there more than once: leave one out")
    if data.get("each_resolution") is False and all(len(value) < 2 for value in lists.values()):
        message = "false would have no effect: there is one resolution; give several, data.resolution=[512,768]"
        yield Problem("data.each_resolution", message)


def _of_buckets(data: dict[str, Any]) -> Iterator[Problem]:
    """What buckets there are."""
    for index, text in enumerate(data.get("bucket_sizes") or []):
        sides = re.fullmatch(r"(\d+)x(\d+)", text) if isinstance(text, str) else None
        if sides is None or min(int(sides[1]), int(sides[2])) < SMALLEST_SIDE:
            message = f"{show(text)} is not accepted: give height x width in pixels, at least {SMALLEST_SIDE}: 768x1344"
            yield Problem(f"data.bucket_sizes[{index}]", message)
    for name in ("min_bucket_side", "max_bucket_side"):
        if data.get(name) is not None and (data.get("bucket_sizes") or data.get("buckets") is False):
            other = "data.bucket_sizes says what the buckets are" if data.get("bucket_sizes") else "data.buckets=false"
            yield Problem(f"data.{name}", f"{show(data[name])} would have no effect: {other}")
    if data.get("bucket_sizes") and data.get("buckets") is False:
        yield Problem("data.buckets", "false and data.bucket_sizes: leave one of them out; one size is a list of one")
    low, high = data.get("min_bucket_side"), data.get("max_bucket_side")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        yield Problem("data.min_bucket_side", f"{low} is above data.max_bucket_side={high}")


def _of_concept(key: str, concept: dict[str, Any]) -> Iterator[Problem]:
    if concept.get("type") == ConceptType.validation:
        for name in filter(lambda name: _changed(concept, name), OF_TRAINING):
            message = f"{show(concept[name])} would have no effect: {key}.type=validation, whose images are seen once"
            yield Problem(f"{key}.{name}", message)
    elif concept.get("samples") is not None and _changed(concept, "repeats"):
        message = f"{show(concept['samples'])} and {key}.repeats={show(concept['repeats'])}: leave one of them out"
        yield Problem(f"{key}.samples", message)


def _changed(concept: dict[str, Any], name: str) -> bool:
    """Whether a field is another than where it is not given."""
    return name in concept and concept[name] != getattr(Concept, name)
