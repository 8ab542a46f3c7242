"""LoRA files: between the adapter's state and the names that kohya, ComfyUI, A1111 and diffusers read."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from otl.config import SettingsError
from otl.formats.files import listed
from otl.formats.files import read as read
from otl.formats.files import write as write
from otl.types import LoraLayer, LoraState

KOHYA = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}
PEFT = {".lora_A.weight": "down", ".lora_B.weight": "up"}
CLIP_ROOTS = ("embeddings.", "encoder.layers.", "final_layer_norm")


def portable_text_path(path: str) -> str:
    """Module path in a CLIP text encoder -> the path that files carry.

    transformers 5.6 took the `text_model.` level out of CLIPTextModel; every other tool looks for it. `text_projection`
    has never been below it.
    """
    return f"text_model.{path}" if path.startswith(CLIP_ROOTS) else path


def text_names(module_names: Iterable[str]) -> dict[str, str]:
    """Module path in a live text encoder -> the path that files carry: what `to_kohya` and `from_kohya` take."""
    return {name: portable_text_path(name) for name in module_names}


def kohya_key(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def to_kohya(state: LoraState, *, prefixes: dict[str, str], names: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    """The adapter under kohya's keys, with the true alpha.

    Args:
        prefixes: part -> what its keys begin with: "lora_unet", "lora_te", "lora_te1", ...
        names: part -> module path -> its path in the file; absent ones keep theirs.

    Raises:
        ValueError: two modules have one key.
    """
    tensors: dict[str, Tensor] = {}
    for part, layers in state.items():
        for path, layer in layers.items():
            key = kohya_key(prefixes[part], names.get(part, {}).get(path, path))
            if f"{key}.alpha" in tensors:
                raise ValueError(f"{part}: {path} and another module would both be {key}")
            tensors[f"{key}.lora_down.weight"] = layer.down
            tensors[f"{key}.lora_up.weight"] = layer.up
            tensors[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
    return tensors


def from_kohya(tensors: dict[str, Tensor], *, prefixes: dict[str, str], names: dict[str, dict[str, str]]) -> LoraState:
    """The inverse of `to_kohya`. A layer without alpha has alpha = rank, as everywhere.

    Args:
        prefixes: part -> what its keys begin with.
        names: part -> path of every module that may be in the file -> its path there.

    Raises:
        SettingsError: a key belongs to none of the modules, or a layer is incomplete.
    """
    owners = {
        kohya_key(prefix, spelled): (part, path)
        for part, prefix in prefixes.items()
        for path, spelled in names.get(part, {}).items()
    }
    return gather(tensors, fields=KOHYA, owners=owners)


def to_peft(state: LoraState) -> dict[str, Tensor]:
    """The adapter under diffusers' own keys. Alpha is folded into B, because readers take it to be the rank."""
    tensors: dict[str, Tensor] = {}
    for part, layers in state.items():
        for path, layer in layers.items():
            key = f"{part}.{portable_text_path(path)}"
            tensors[f"{key}.lora_A.weight"] = layer.down
            tensors[f"{key}.lora_B.weight"] = layer.up * (layer.alpha / layer.down.shape[0])
    return tensors


def from_peft(tensors: dict[str, Tensor], *, modules: dict[str, Iterable[str]]) -> LoraState:
    """The inverse of `to_peft`: alpha is the rank.

    Args:
        modules: part -> path of every module that may be in the file.

    Raises:
        SettingsError: a key belongs to none of the modules, or a layer is incomplete.
    """
    owners = {f"{part}.{portable_text_path(path)}": (part, path) for part, paths in modules.items() for path in paths}
    return gather(tensors, fields=PEFT, owners=owners)


def gather(tensors: dict[str, Tensor], *, fields: dict[str, str], owners: dict[str, tuple[str, str]]) -> LoraState:
    """Put the tensors of each layer together.

    Args:
        fields: end of a key -> field of the layer.
        owners: key without its end -> part and module path.

    Raises:
        SettingsError: a key belongs to none of the modules, or a layer is incomplete.
    """
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    leftover = []
    for key, tensor in tensors.items():
        end = next((end for end in fields if key.endswith(end)), "")
        owner = owners.get(key.removesuffix(end)) if end else None
        if owner is None:
            leftover.append(key)
        else:
            found.setdefault(owner, {})[fields[end]] = tensor
    if leftover:
        raise SettingsError(f"not a LoRA of this model: {len(leftover)} keys fit no module: {listed(sorted(leftover))}")
    state: LoraState = {}
    for (part, path), layer in found.items():
        state.setdefault(part, {})[path] = complete(f"{part}.{path}", layer)
    return state


def complete(name: str, layer: dict[str, Tensor]) -> LoraLayer:
    """The layer of its tensors.

    Raises:
        SettingsError: one is missing, or the ranks of both differ.
    """
    if missing := {"down", "up"} - layer.keys():
        raise SettingsError(f"incomplete LoRA: {name} has no {missing.pop()} matrix")
    down, up = layer["down"], layer["up"]
    if up.shape[1] != down.shape[0]:
        raise SettingsError(
            f"broken LoRA: {name} is rank {down.shape[0]} on the way down and {up.shape[1]} on the way up"
        )
    return LoraLayer(down=down, up=up, alpha=float(layer["alpha"]) if "alpha" in layer else float(down.shape[0]))


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file in the dtype it is written in. Alphas stay fp32: they are scalars, and exact."""
    return {key: tensor if key.endswith(".alpha") else tensor.to(dtype) for key, tensor in tensors.items()}


def delta(layer: LoraLayer) -> Tensor:
    """What the layer adds to its weight: [out, in] or [out, in, kh, kw]."""
    scale = layer.alpha / layer.down.shape[0]
    product = layer.up.flatten(1) @ layer.down.flatten(1)
    return scale * product.unflatten(1, layer.down.shape[1:])


def norm_of_product(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norm of up @ down, [out, r] and [r, in], from two [r, r] products."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def relative_difference(a: LoraLayer, b: LoraLayer) -> float:
    """|delta(b) - delta(a)| / |delta(a)| in the Frobenius norm; 0 where both are nothing, infinite where one is NaN.

    Raises:
        ValueError: the layers are not of one weight.
    """
    if a.up.shape[0] != b.up.shape[0] or a.down.shape[1:] != b.down.shape[1:]:
        raise ValueError("the layers belong to weights of different shapes")
    factors = [(x.up.flatten(1).double() * (x.alpha / x.down.shape[0]), x.down.flatten(1).double()) for x in (a, b)]
    (up_a, down_a), (up_b, down_b) = factors
    difference = norm_of_product(torch.cat([up_a, up_b], dim=1), torch.cat([-down_a, down_b]))
    if difference == 0:
        return 0.0
    return (difference / norm_of_product(up_a, down_a)).nan_to_num(nan=math.inf, posinf=math.inf).item()


def compare(a: LoraState, b: LoraState) -> float:
    """The largest relative difference of the layers' deltas; below 1e-7 is rounding of the comparison itself.

    Raises:
        ValueError: they adapt different modules.
    """
    paths_a, paths_b = ({f"{part}.{path}" for part, layers in state.items() for path in layers} for state in (a, b))
    if paths_a != paths_b:
        raise ValueError(f"different modules: {listed(sorted(paths_a ^ paths_b))}")
    return max((relative_difference(a[part][path], b[part][path]) for part in a for path in a[part]), default=0.0)
