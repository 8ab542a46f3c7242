"""What an adapter does to the weight it sits on, by each kind's published formula, and by how much two differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor

from otl.formats.files import listed
from otl.types import AdapterLayer, AdapterState, LohaLayer, LokrLayer, LoraLayer, OftLayer

Layer = TypeVar("Layer", bound=AdapterLayer)
Weights = Callable[[str, str], Tensor]
"""(part, module path) -> the frozen weight below an adapter."""


@singledispatch
def delta(layer: AdapterLayer, weight: Tensor) -> Tensor:
    """What the layer adds to its weight, in the weight's shape; computed in the layer's dtype.

    Args:
        weight: [out, in] or [out, in, kh, kw], the frozen one; only DoRA and OFT read its values.
    """
    raise TypeError(f"{type(layer).__name__} is no layer of an adapter")


@delta.register
def _(layer: LoraLayer, weight: Tensor) -> Tensor:
    product = layer.alpha / layer.down.shape[0] * layer.up.flatten(1) @ layer.down.flatten(1)
    change = product.reshape(weight.shape)
    if layer.magnitude is None:
        return change
    adapted = weight.to(change) + change
    lengths = row_norms(weight.to(change) if layer.frozen_lengths else adapted)
    return adapted * per_output(layer.magnitude / lengths, weight) - weight.to(change)


def with_lengths(layer: LoraLayer, weight: Tensor, *, frozen: bool) -> LoraLayer:
    """The same DoRA, its magnitudes meant for the frozen or for the adapted rows' lengths."""
    if layer.magnitude is None or layer.frozen_lengths == frozen:
        return layer
    base = weight.double()
    adapted = base + delta(converted(replace(layer, magnitude=None), torch.float64), base)
    share = row_norms(base) / row_norms(adapted)
    magnitude = layer.magnitude.double() * (share if frozen else 1 / share)
    return replace(layer, magnitude=magnitude.to(layer.magnitude), frozen_lengths=frozen)


@delta.register
def _(layer: LohaLayer, weight: Tensor) -> Tensor:
    first = product_of(layer.w1_a, layer.w1_b, layer.t1)
    second = product_of(layer.w2_a, layer.w2_b, layer.t2)
    return (layer.alpha / layer.w1_b.shape[0] * first * second).reshape(weight.shape)


@delta.register
def _(layer: LokrLayer, weight: Tensor) -> Tensor:
    first, second = kronecker_factors(layer)
    if second.dim() == 4:
        first = first[:, :, None, None]
    return (strength(layer) * torch.kron(first, second.contiguous())).reshape(weight.shape)


@delta.register
def _(layer: OftLayer, weight: Tensor) -> Tensor:
    # As y = x @ R turns the outputs, the weight of output m is the sum over n of R[n, m] times that of output n.
    rows = weight.to(layer.blocks).reshape(*layer.blocks.shape[:2], -1)
    return (rotation(layer.blocks).transpose(1, 2) @ rows).reshape(weight.shape) - weight.to(layer.blocks)


def rotation(blocks: Tensor) -> Tensor:
    """[k, n, n] any numbers -> [k, n, n] orthogonal: Cayley's (I + Q) (I - Q)^-1 of Q = blocks - blocks^T."""
    q = blocks - blocks.transpose(1, 2)
    one = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    # Both are functions of Q, so their order is of no account. `solve` would wait for the device to look for an error,
    # and there is none: I - Q is never singular.
    return torch.linalg.solve_ex(one - q, one + q).result


def product_of(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """a @ b; of a Tucker decomposition [out, in, kh, kw]."""
    return a @ b if t is None else torch.einsum("i j h w, i o, j c -> o c h w", t, a, b)


def kronecker_factors(layer: LokrLayer) -> tuple[Tensor, Tensor]:
    """w1 and w2, multiplied out; the second keeps its kernel flat where the file has it flat."""
    first, second = layer.w1, layer.w2
    if first is None:
        assert layer.w1_a is not None and layer.w1_b is not None
        first = layer.w1_a @ layer.w1_b
    if second is None:
        assert layer.w2_a is not None and layer.w2_b is not None
        second = product_of(layer.w2_a, layer.w2_b, layer.t2)
    return first, second


def strength(layer: LokrLayer) -> float:
    """alpha / rank; 1 where both factors are whole."""
    down = layer.w1_b if layer.w1_b is not None else layer.w2_b
    return 1.0 if down is None else layer.alpha / down.shape[0]


def matrix_shape(layer: AdapterLayer) -> tuple[int, int | None]:
    """Outputs, and inputs times kernel, of the weight that the layer fits; OFT fits any number of inputs."""
    if isinstance(layer, LoraLayer):
        return layer.up.shape[0], layer.down[0].numel()
    if isinstance(layer, OftLayer):
        return layer.blocks.shape[0] * layer.blocks.shape[1], None
    shapes = converted(layer, "meta")
    if isinstance(shapes, LohaLayer):
        first = product_of(shapes.w1_a, shapes.w1_b, shapes.t1)
        return first.shape[0], first[0].numel()
    first, second = kronecker_factors(shapes)
    return first.shape[0] * second.shape[0], first.shape[1] * second[0].numel()


def row_norms(weight: Tensor) -> Tensor:
    """[out, ...] -> [out] lengths of the rows."""
    return weight.flatten(1).norm(dim=1)


def per_output(values: Tensor, weight: Tensor) -> Tensor:
    """[out] -> a shape that multiplies the weight's rows."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def norm_of_product(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norm of up @ down, [out, r] and [r, in], from two [r, r] products."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def low_rank(layer: AdapterLayer) -> bool:
    """Whether its delta is a product of two thin matrices and nothing else."""
    return isinstance(layer, LoraLayer) and layer.magnitude is None


def relative_difference(a: AdapterLayer, b: AdapterLayer, weight: Tensor | None = None) -> float:
    """|delta(b) - delta(a)| / |delta(a)| in the Frobenius norm; 0 where both are nothing, infinite where one is NaN.

    Args:
        weight: the frozen one; plain LoRA needs none.

    Raises:
        ValueError: the layers are not of one weight.
    """
    if isinstance(a, LoraLayer) and isinstance(b, LoraLayer) and low_rank(a) and low_rank(b):
        return ratio(*low_rank_norms(a, b))
    assert weight is not None
    before, after = (delta(converted(layer, torch.float64), weight.double()) for layer in (a, b))
    return ratio((after - before).norm(), before.norm())


def low_rank_norms(a: LoraLayer, b: LoraLayer) -> tuple[Tensor, Tensor]:
    """|delta(b) - delta(a)| and |delta(a)|, without either delta."""
    if a.up.shape[0] != b.up.shape[0] or a.down.shape[1:] != b.down.shape[1:]:
        raise ValueError("the layers belong to weights of different shapes")
    factors = [(x.up.flatten(1).double() * (x.alpha / x.down.shape[0]), x.down.flatten(1).double()) for x in (a, b)]
    (up_a, down_a), (up_b, down_b) = factors
    difference = norm_of_product(torch.cat([up_a, up_b], dim=1), torch.cat([-down_a, down_b]))
    return difference, norm_of_product(up_a, down_a)


def ratio(difference: Tensor, size: Tensor) -> float:
    if difference == 0:
        return 0.0
    return (difference / size).nan_to_num(nan=math.inf, posinf=math.inf).item()


def converted(layer: Layer, to: torch.dtype | str) -> Layer:
    """The layer with its tensors in another dtype or on another device."""
    values: dict[str, Any] = {
        name: value.to(to) if isinstance(value, Tensor) else value for name, value in vars(layer).items()
    }
    return type(layer)(**values)


def compare(a: AdapterState, b: AdapterState, weights: Weights | None = None) -> float:
    """The largest relative difference of the layers' deltas; below 1e-7 is rounding of the comparison itself.

    Args:
        weights: the frozen ones; an adapter of nothing but plain LoRA needs none.

    Raises:
        ValueError: they adapt different modules.
    """
    paths_a, paths_b = ({f"{part}.{path}" for part, layers in state.items() for path in layers} for state in (a, b))
    if paths_a != paths_b:
        raise ValueError(f"different modules: {listed(sorted(paths_a ^ paths_b))}")
    differences = (
        relative_difference(
            layer, b[part][path], weights(part, path) if weights is not None and not low_rank(layer) else None
        )
        for part, layers in a.items()
        for path, layer in layers.items()
    )
    return max(differences, default=0.0)
