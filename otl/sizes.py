"""Sizes of images and where they are cut. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Height and width in pixels."""

    h: int
    w: int

    @property
    def area(self) -> int:
        return self.h * self.w

    def __str__(self) -> str:
        return f"{self.h}x{self.w}"


class Crop(NamedTuple):
    """The offset of a crop in the scaled image, in pixels."""

    top: int
    left: int
