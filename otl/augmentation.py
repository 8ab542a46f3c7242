"""What augmentation settings have no effect beside the others. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from otl.config import Problem

STRENGTHS = ("rotation", "brightness", "contrast", "saturation", "hue", "crop_jitter", "resize_jitter")


def varies(augment: dict[str, Any]) -> bool:
    """Whether an image may look different from one time to the next."""
    return any(augment.get(name) for name in STRENGTHS) or augment.get("flip") not in (None, 0, 1)


def varying(data: dict[str, Any]) -> list[str]:
    """The concepts to train on whose images vary; that of `data.path` is called "data"."""
    common = data.get("augment") or {}
    own = {
        name: common | {key: value for key, value in (concept.get("augment") or {}).items() if value is not None}
        for name, concept in (data.get("concepts") or {}).items()
        if concept.get("enabled", True) and not _held_out(concept)
    }
    everything = ({"data": common} if data.get("path") else {}) | own
    return [name for name, augment in everything.items() if varies(augment)]


def without_effect(data: dict[str, Any]) -> Iterator[Problem]:
    """Variations of what does not vary or is not cached, and chance for images that are held out."""
    count = data.get("image_variations")
    if isinstance(count, int) and count > 1:
        if data.get("cache") is False:
            message = "without a cache an image looks different each time anyway; set data.cache=true, or leave it out"
            yield Problem("data.image_variations", f"{count} would have no effect: {message}")
        elif not varying(data):
            message = "nothing in data.augment is random (flip, rotation, brightness, crop_jitter and others)"
            yield Problem("data.image_variations", f"{count} would have no effect: {message}")
    for name, concept in (data.get("concepts") or {}).items():
        given = {key: value for key, value in (concept.get("augment") or {}).items() if value is not None}
        if _held_out(concept) and varies(given):
            key = next(key for key in given if varies({key: given[key]}))
            message = "its images are held out, and look the same every time; what begins with fixed_ holds for them"
            yield Problem(f"data.concepts.{name}.augment.{key}", f"{given[key]} would have no effect: {message}")


def _held_out(concept: dict[str, Any]) -> bool:
    kind = concept.get("type")
    return getattr(kind, "name", kind) == "validation"
