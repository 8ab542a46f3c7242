"""Layers of adapter files that sit on several layers of a network at once: other programs have one weight there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from otl.config import SettingsError
from otl.formats.files import listed
from otl.types import AdapterLayer, LohaLayer, LokrLayer, LoraLayer, OftLayer

BETWEEN = "+"  # the paths of a network's layers whose weights are one in a file
CUT: dict[type[AdapterLayer], tuple[str, ...]] = {  # the fields whose rows are outputs; the others all pieces share
    LoraLayer: ("up", "magnitude"),
    LohaLayer: ("w1_a", "w2_a"),
    LokrLayer: ("w1", "w1_a"),
    OftLayer: ("blocks",),
}


def apart(layers: dict[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """The same with a layer for each path, where a key names several; what each adds to its weight is exactly the same.

    Raises:
        SettingsError: a layer has two of them, or one cannot be cut.
    """
    found: dict[str, AdapterLayer] = {}
    twice = []
    for key, layer in layers.items():
        paths = key.split(BETWEEN)
        twice += [path for path in paths if path in found]
        found |= dict(zip(paths, cut(layer, len(paths), name=key)))
    if twice:
        raise SettingsError(f"{listed(twice)}: adapted twice, alone and together with others")
    return found


def cut(layer: AdapterLayer, count: int, *, name: str) -> list[AdapterLayer]:
    """As many layers, of equal shares of the outputs in their order; each has memory of its own, as it trains alone."""
    tensors = {field: value for field, value in vars(layer).items() if isinstance(value, Tensor)}
    rows = [field for field in CUT[type(layer)] if field in tensors]
    if odd := [field for field in rows if len(tensors[field]) % count]:
        raise SettingsError(
            f"{name}: {odd[0]} has {len(tensors[odd[0]])} rows, which cannot be cut into {count} layers"
        )
    found = []
    for k in range(count):
        own: dict[str, Any] = {
            field: (tensor.chunk(count)[k] if field in rows else tensor).clone() for field, tensor in tensors.items()
        }
        found.append(replace(layer, **own))
    return found
