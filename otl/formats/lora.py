"""Adapter files: between the adapter's state and the names that kohya, LyCORIS, ComfyUI, A1111 and diffusers read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from otl.config import SettingsError
from otl.formats.files import listed as listed
from otl.formats.files import read as read
from otl.formats.files import write as write
from otl.formats.layers import complete
from otl.formats.layers import rank_of as rank_of
from otl.formats.layers import title_of as title_of
from otl.types import AdapterLayer, AdapterState, LohaLayer, LokrLayer, LoraLayer, OftLayer

HADAMARD = {name: f".hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
KRONECKER = {name: f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
Ends = dict[type[AdapterLayer], dict[str, str]]
"""kind of layer -> field -> how its key ends."""

KOHYA: Ends = {  # kohya's names for LoRA, LyCORIS's for the others
    LoraLayer: {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"},
    LohaLayer: HADAMARD,
    LokrLayer: KRONECKER,
    OftLayer: {"blocks": ".oft_blocks"},
}
MAGNITUDE = ".lora_magnitude_vector.weight"  # transformers takes no notice of the name without .weight that PEFT saves
PEFT: Ends = {
    LoraLayer: {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": MAGNITUDE},
    LohaLayer: HADAMARD,
    LokrLayer: KRONECKER,
}
OFT_ALPHA = 1e4  # readers limit the length of Q by it, each in its way; 0 is no limit to some, no rotation to others
LENGTHS, FROZEN = "dora_lengths", "frozen"  # of ss_network_args: which lengths a file's dora_scale is for
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
    """A prefix with a dot at its end leaves the path as it is: "transformer." is what ComfyUI reads for PixArt."""
    return f"{prefix}{path}" if prefix.endswith(".") else f"{prefix}_{path.replace('.', '_')}"


def to_kohya(state: AdapterState, *, prefixes: dict[str, str], names: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    """The adapter under kohya's and LyCORIS's keys, with the true alpha.

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
            for field, tensor in tensors_of(layer).items():
                tensors[f"{key}{KOHYA[type(layer)][field]}"] = tensor
            if isinstance(layer, LoraLayer) and layer.magnitude is not None:
                ones = [1] * (layer.down.dim() - 1)
                tensors[f"{key}.dora_scale"] = layer.magnitude.reshape(-1, *ones)
            tensors[f"{key}.alpha"] = torch.tensor(OFT_ALPHA if isinstance(layer, OftLayer) else float(layer.alpha))
    return tensors


def from_kohya(
    tensors: dict[str, Tensor], *, prefixes: dict[str, str], names: dict[str, dict[str, str]]
) -> AdapterState:
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
    return gather(tensors, ends=by_end(KOHYA), owners=owners)


def to_peft(state: AdapterState) -> dict[str, Tensor]:
    """The adapter under PEFT's own keys. Alpha is folded into the weights, because readers take it to be the rank."""
    tensors: dict[str, Tensor] = {}
    for part, layers in state.items():
        for path, layer in layers.items():
            key = f"{part}.{portable_text_path(path)}"
            for field, tensor in tensors_of(folded(layer)).items():
                tensors[f"{key}{PEFT[type(layer)][field]}"] = tensor
            if isinstance(layer, LoraLayer) and layer.magnitude is not None and layer.down.dim() == 4:
                tensors[f"{key}{MAGNITUDE}"] = layer.magnitude.reshape(1, -1, 1, 1)
    return tensors


def from_peft(tensors: dict[str, Tensor], *, modules: Mapping[str, Iterable[str]]) -> AdapterState:
    """The inverse of `to_peft`: alpha is the rank.

    Args:
        modules: part -> path of every module that may be in the file.

    Raises:
        SettingsError: a key belongs to none of the modules, or a layer is incomplete.
    """
    owners = {f"{part}.{portable_text_path(path)}": (part, path) for part, paths in modules.items() for path in paths}
    return gather(tensors, ends=by_end(PEFT), owners=owners)


def with_frozen_lengths(state: AdapterState, like: AdapterState) -> AdapterState:
    """The adapter of a file, whose magnitudes are for the lengths that those of `like` are for: no key says it."""
    return {
        part: {
            path: replace(layer, frozen_lengths=layer_like.frozen_lengths)
            if isinstance(layer, LoraLayer) and isinstance(layer_like := like[part][path], LoraLayer)
            else layer
            for path, layer in of_part.items()
        }
        for part, of_part in state.items()
    }


def tensors_of(layer: AdapterLayer) -> dict[str, Tensor]:
    """The fields of a layer that hold tensors."""
    return {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}


def folded(layer: AdapterLayer) -> AdapterLayer:
    """The same delta with alpha = rank."""
    rank = rank_of(layer)
    if isinstance(layer, OftLayer) or rank is None:
        return layer
    scale = layer.alpha / rank
    first = next(field for field in ("up", "w2_a", "w2", "w1_a") if getattr(layer, field, None) is not None)
    values: dict[str, Any] = vars(layer) | {first: getattr(layer, first) * scale, "alpha": float(rank)}
    return type(layer)(**values)


def by_end(ends: Ends) -> dict[str, tuple[type[AdapterLayer], str]]:
    """How a key ends -> kind of layer and field."""
    return {end: (kind, field) for kind, of_kind in ends.items() for field, end in of_kind.items()}


def gather(
    tensors: dict[str, Tensor],
    *,
    ends: dict[str, tuple[type[AdapterLayer], str]],
    owners: dict[str, tuple[str, str]],
) -> AdapterState:
    """Put the tensors of each layer together.

    Args:
        ends: how a key ends -> kind of layer and field; ".alpha" goes with any.
        owners: key without its end -> part and module path.

    Raises:
        SettingsError: a key belongs to none of the modules, or a layer is incomplete.
    """
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    kinds: dict[tuple[str, str], type[AdapterLayer]] = {}
    leftover = []
    for key, tensor in tensors.items():
        stem, end = parted(key, ends)
        owner = owners.get(stem) if end else None
        kind, field = ends.get(end, (None, "alpha"))
        own = found.setdefault(owner, {}) if owner is not None else {}
        if field in own:
            raise SettingsError(f"{key} stands in it twice, in two spellings: which of them counts?")
        if owner is None or (kind is not None and kinds.setdefault(owner, kind) is not kind):
            leftover.append(key)
        else:
            # PEFT lays a convolution's magnitudes out as [1, out, 1, 1].
            own[field] = tensor.flatten() if "magnitude" in end else tensor
    leftover += [f"the alpha of {part}.{path}" for part, path in found.keys() - kinds.keys()]
    if leftover:
        raise SettingsError(f"not a LoRA of this model: {len(leftover)} keys fit no module: {listed(sorted(leftover))}")
    state: AdapterState = {}
    for (part, path), layer in found.items():
        state.setdefault(part, {})[path] = complete(f"{part}.{path}", kinds[part, path], layer)
    return state


def parted(key: str, ends: Iterable[str]) -> tuple[str, str]:
    """A key without its end, and its end; "" where it has none of them."""
    end = next((end for end in (*ends, ".alpha") if key.endswith(end)), "")
    return key.removesuffix(end), end


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file in the dtype it is written in. Alphas and DoRA's magnitudes stay fp32: they are few, and a
    magnitude is compared with a length that it hardly differs from."""
    exact = (".alpha", ".dora_scale", MAGNITUDE)
    return {key: tensor if key.endswith(exact) else tensor.to(dtype) for key, tensor in tensors.items()}
