"""A layer of an adapter, made of the tensors of a file: what must be there, and how they must fit each other."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from otl.config import SettingsError
from otl.formats.files import require_numbers
from otl.types import AdapterLayer, LohaLayer, LokrLayer, LoraLayer, OftLayer

REQUIRED: dict[type[AdapterLayer], tuple[str, ...]] = {
    LoraLayer: ("down", "up"),
    LohaLayer: ("w1_a", "w1_b", "w2_a", "w2_b"),
    OftLayer: ("blocks",),
}
TITLES = {LoraLayer: "LoRA", LohaLayer: "LoHa", LokrLayer: "LoKr", OftLayer: "OFT"}
MOST = torch.finfo(torch.float32).max

Form = dict[str, str]
"""field -> its sizes, a letter for each axis; of a layer, equal letters are equal sizes. See `otl.types` for each."""

FORMS: dict[type[AdapterLayer], tuple[tuple[Form, ...], ...]] = {  # factors, each in one of some forms
    LoraLayer: (({"down": "ri"}, {"down": "rihw"}), ({"up": "or"}, {"up": "or11"})),
    LohaLayer: (
        (
            {"w1_a": "or", "w1_b": "ri", "w2_a": "or", "w2_b": "ri"},
            {"w1_a": "ro", "w1_b": "ri", "t1": "rrhw", "w2_a": "ro", "w2_b": "ri", "t2": "rrhw"},
        ),
    ),
    LokrLayer: (
        ({"w1": "ac"}, {"w1_a": "ar", "w1_b": "rc"}),
        (
            {"w2": "bd"},
            {"w2": "bdhw"},
            {"w2_a": "br", "w2_b": "rd"},
            {"w2_a": "rb", "w2_b": "rd", "t2": "rrhw"},
        ),
    ),
    OftLayer: (({"blocks": "nss"},),),
}


def complete(name: str, kind: type[AdapterLayer], layer: dict[str, Tensor]) -> AdapterLayer:
    """The layer of its tensors.

    Raises:
        SettingsError: one is missing, they do not fit each other, or hold what is no number.
    """
    require_whole(name, kind, layer)
    require_numbers(name, {field: tensor for field, tensor in layer.items() if field != "alpha"})
    alpha = single(f"the alpha of {name}", layer["alpha"]) if "alpha" in layer else None
    if kind is OftLayer:
        return oft_layer(layer["blocks"], limit=alpha or 0)
    if "magnitude" in layer:
        layer["magnitude"] = magnitude(name, layer["magnitude"], layer["up"])
    values: dict[str, Any] = layer | {"alpha": 0.0}
    whole: AdapterLayer = kind(**values)
    assert not isinstance(whole, OftLayer)
    rank = rank_of(whole)
    whole.alpha = float(rank or 1) if alpha is None else alpha
    if rank is not None and not whole.alpha:
        raise SettingsError(f"the alpha of {name} is 0: it adds nothing, and would learn nothing")
    return whole


def require_whole(name: str, kind: type[AdapterLayer], layer: dict[str, Tensor]) -> None:
    """Refuse a layer that lacks a matrix, or whose matrices do not meet."""
    if kind is LokrLayer:
        missing = [w for w in ("w1", "w2") if w not in layer and not {f"{w}_a", f"{w}_b"} <= layer.keys()]
    else:
        missing = [field.name for field in fields(kind) if field.name in REQUIRED[kind] and field.name not in layer]
    if missing:
        raise SettingsError(f"incomplete {TITLES[kind]}: {name} has no {missing[0]} matrix")
    if not fit(layer, FORMS[kind]):
        shapes = ", ".join(
            f"{field} {list(tensor.shape)}" for field, tensor in layer.items() if field not in ("alpha", "magnitude")
        )
        raise SettingsError(f"broken {TITLES[kind]}: the matrices of {name} do not fit each other: {shapes}")


def fit(layer: dict[str, Tensor], factors: tuple[tuple[Form, ...], ...]) -> bool:
    """Whether each factor has one of its forms, equal letters are equal sizes, and none is 0."""
    chosen = [form_of(layer, forms) for forms in factors]
    axes = [
        (letter, size)
        for form in chosen
        for field, letters in (form or {}).items()
        for letter, size in zip(letters, layer[field].shape)
    ]
    sizes = dict(axes) | {"1": 1}
    return None not in chosen and all(0 < size == sizes[letter] for letter, size in axes)


def form_of(layer: dict[str, Tensor], forms: tuple[Form, ...]) -> Form | None:
    """The form with exactly the tensors that are there, and with as many axes."""
    there = {field for form in forms for field in form if field in layer}
    for form in forms:
        if form.keys() == there and all(layer[field].dim() == len(letters) for field, letters in form.items()):
            return form
    return None


def number(what: str, value: Any) -> float:
    """A number of a file, or of its header's JSON.

    Raises:
        SettingsError: it is none, or NaN, or beyond what fp32 holds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
        raise SettingsError(f"{what} is {str(value)[:80]}, not a finite number")
    return float(value)


def single(what: str, tensor: Tensor) -> float:
    """The only number of a tensor. Raises SettingsError: there are several, or it is none."""
    return number(what, tensor.item() if tensor.numel() == 1 else f"of the shape {list(tensor.shape)}")


def rank_of(layer: AdapterLayer) -> int | None:
    """Inner dimension; None where a layer has none."""
    if isinstance(layer, LoraLayer):
        return layer.down.shape[0]
    if isinstance(layer, OftLayer):
        return None
    down = layer.w1_b if layer.w1_b is not None else layer.w2_b
    return None if down is None else down.shape[0]


def title_of(layer: AdapterLayer) -> str:
    """What people call an adapter of such layers."""
    return "DoRA" if isinstance(layer, LoraLayer) and layer.magnitude is not None else TITLES[type(layer)]


def magnitude(name: str, scale: Tensor, up: Tensor) -> Tensor:
    """DoRA's magnitudes [out] from a file's [out], [out, 1] or [out, 1, 1, 1].

    Raises:
        SettingsError: they are one for each input, as some trainers have it.
    """
    outputs = up.shape[0]
    if scale.shape[:1] != (outputs,) or scale.numel() != outputs:
        raise SettingsError(
            f"{name}: dora_scale {tuple(scale.shape)} is one for each input; only one for each of the {outputs} "
            "outputs can be trained further"
        )
    return scale.flatten()


def oft_layer(blocks: Tensor, *, limit: float) -> OftLayer:
    """The layer, its Q no longer than the file's alpha allows.

    Args:
        limit: times the number of outputs, the longest Q; 0 is none: kohya's and LyCORIS's meaning of alpha.
    """
    length = (blocks - blocks.transpose(1, 2)).float().norm().item()
    longest = limit * blocks.shape[0] * blocks.shape[1]
    return OftLayer(blocks * (longest / length) if 0 < longest < length else blocks)
