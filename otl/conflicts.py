"""Settings of the dataset that make no sense together, as far as it can be told before the images are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from otl.config import Concept, ConceptType, Problem
from otl.wording import show

OF_TRAINING = ("repeats", "samples", "loss_weight")  # fields of a concept that its validation images have no use for


def of_data(data: dict[str, Any]) -> Iterator[Problem]:
    """What would have no effect, or contradicts something else."""
    concepts: dict[str, dict[str, Any]] = data.get("concepts") or {}
    if data.get("path") and "data" in concepts:
        yield Problem("data.concepts.data", "the images of data.path go by this name: give the concept another one")
    for name, concept in concepts.items():
        yield from _of_concept(f"data.concepts.{name}", concept)


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
