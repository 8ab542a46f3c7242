"""Adapter files that a training goes on from: any tool's names, any tool's way to write the strength."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor, nn

from otl.config import SettingsError
from otl.formats.deltas import converted, matrix_shape, with_lengths
from otl.formats.embedding import bundle_keys
from otl.formats.files import listed, read_any
from otl.formats.layers import number
from otl.formats.lora import FROZEN, LENGTHS, gather, parted, rank_of, title_of
from otl.formats.objects import parsed
from otl.formats.spellings import all_ends, denoiser_stems, text_stems
from otl.formats.stacked import BETWEEN, apart
from otl.methods.targets import layers
from otl.types import AdapterLayer, AdapterState, LokrLayer, LoraLayer, OftLayer

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

DIFFUSERS_HEADER = "lora_adapter_metadata"  # JSON: "unet.lora_alpha", "unet.alpha_pattern", ...
PEFT_CONFIG = "adapter_config.json"
PEFT_ROOT = "base_model.model."  # what PEFT puts before the names of layers
ARGUMENTS = "ss_network_args"  # JSON of kohya's and LyCORIS's header
PATTERN_SECONDS = 1.0  # a pattern of PEFT's may take at one layer; some take longer than the universe has been there
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def continued(module: DiffusionModule, path: Path, accepted: Collection[str]) -> AdapterState:
    """The adapter of a file, as layers of this model.

    Args:
        path: a .safetensors file in the names of kohya, LyCORIS, ComfyUI, A1111, diffusers or PEFT, one of torch.save
            (.bin, .pt, .ckpt) with nothing but tensors, or PEFT's folder.
        accepted: kinds of adapters that the method can go on from: "LoRA", ...

    Raises:
        SettingsError: it is not there, belongs to another model or kind, or holds what cannot be trained; all that does
            not fit is listed.
    """
    folder = path if path.is_dir() else path.parent
    file = weights_in(path) if path.is_dir() else path
    try:
        tensors, header = read_any(file)
        if carried := bundle_keys(tensors):
            log.info(f"{path} carries {listed(carried)}: embeddings go on with method.embeddings.NAME.file={path}")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in carried}
        known = owners(module)
        gathered = gather(tensors, ends=all_ends(), owners=known)
        if not any(key.endswith(".alpha") for key in tensors):
            peft = folder / PEFT_CONFIG
            named = any(key.startswith(PEFT_ROOT) for key in tensors)
            settings = settings_of(header, peft if named and peft.is_file() else None)
            apply_strengths(gathered, settings, names_in(tensors, known))
        state = {part: apart(of_part) for part, of_part in gathered.items()}
        frozen = has_magnitudes(state) and parsed(header.get(ARGUMENTS) or "{}", ARGUMENTS).get(LENGTHS) == FROZEN
    except SettingsError as error:
        raise SettingsError(f"method.from_file={path}: {error}") from error
    check_kind(state, path, accepted)
    return {part: fitted(module.part(part), part, of_part, path, frozen) for part, of_part in state.items()}


def weights_in(folder: Path) -> Path:
    """The weights in PEFT's folder, by the names of its newer and older versions."""
    return next((folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()), folder / PEFT_WEIGHTS[0])


def owners(module: DiffusionModule) -> dict[str, tuple[str, str]]:
    """What a key may begin with -> part and path of the layer that it means; of several layers, all their paths."""
    found: dict[str, tuple[str, str]] = {}
    for part in module.lora_targets:
        names = layers(module.part(part))
        prefix = module.kohya_prefixes[part]
        if part in module.text_encoders:
            position, count = module.text_encoders.index(part), len(module.text_encoders)
            stems = {name: text_stems(part, name, prefix=prefix, position=position, count=count) for name in names}
        else:
            spelled = {name: [name, own] for name, own in module.denoiser_names(names).items()}
            for original, stacked in module.original_names(names).items():
                spelled.setdefault(BETWEEN.join(stacked), []).append(original)
            stems = {name: denoiser_stems(part, paths, prefix=prefix) for name, paths in spelled.items()}
        for name, of_name in stems.items():
            for stem in of_name:
                found.setdefault(stem, (part, name))
    return found


def check_kind(state: AdapterState, path: Path, accepted: Collection[str]) -> None:
    """Refuse a file of another kind of adapter."""
    others = {title_of(layer) for of_part in state.values() for layer in of_part.values()} - set(accepted)
    if others:
        found = others.pop()
        wanted = " or ".join(accepted)
        raise SettingsError(f"method.from_file={path} holds a {found}, not a {wanted}: use method={found.lower()}")


def settings_of(header: dict[str, str], peft: Path | None) -> dict[str, Any]:
    """PEFT's settings beside the weights: "lora_alpha", ..., with the part before them where diffusers wrote them."""
    if DIFFUSERS_HEADER in header:
        return parsed(header[DIFFUSERS_HEADER], DIFFUSERS_HEADER)
    return parsed(peft.read_bytes(), peft.name) if peft is not None else {}


def has_magnitudes(state: AdapterState) -> bool:
    """Whether some layer is a DoRA's."""
    layers_of_all = [layer for of_part in state.values() for layer in of_part.values()]
    return any(isinstance(layer, LoraLayer) and layer.magnitude is not None for layer in layers_of_all)


def names_in(tensors: Iterable[str], owners: dict[str, tuple[str, str]]) -> dict[tuple[str, str], str]:
    """part and path of each layer -> its name in the network that the file was made with."""
    stems = [parted(key, all_ends())[0] for key in tensors]
    return {
        owners[stem]: stem.removeprefix(PEFT_ROOT).removeprefix(f"{owners[stem][0]}.")
        for stem in stems
        if stem in owners
    }


def apply_strengths(state: AdapterState, settings: dict[str, Any], names: dict[tuple[str, str], str]) -> None:
    """Set the strengths that PEFT keeps beside the weights; without them alpha is the rank.

    Args:
        names: of the layers in the network that the settings' patterns were written for.
    """
    for part, of_part in state.items():
        own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
        own = own or settings
        usual = own.get("lora_alpha", own.get("alpha"))
        if usual is None:
            continue
        for path, layer in of_part.items():
            alpha = by_peft(own, "alpha_pattern", names[part, path], usual)
            if isinstance(layer, LokrLayer) and rank_of(layer) is None and layer.w1 is not None:
                # Only PEFT multiplies a LoKr without a rank by alpha / rank.
                layer.w1 = layer.w1 * (alpha / by_peft(own, "rank_pattern", names[part, path], own.get("r")))
            elif not isinstance(layer, OftLayer):
                rank = rank_of(layer)
                assert rank is not None
                layer.alpha = alpha * math.sqrt(rank) if own.get("use_rslora") else alpha


def by_peft(settings: dict[str, Any], patterns: str, name: str, usual: Any) -> float:
    """The value of the first pattern that means a layer, by PEFT's own rule; the usual one where none does.

    Args:
        patterns: which of the settings has them.

    Raises:
        SettingsError: a pattern is none or takes for ever, or a value is no number above 0.
    """
    try:
        found = next((value for key, value in (settings.get(patterns) or {}).items() if means(key, name)), usual)
    except (AttributeError, regex.error, TimeoutError) as error:
        raise SettingsError(f"PEFT's {patterns} is none that can be read ({error})") from error
    value = number(f"by PEFT's settings {patterns.partition('_')[0]} of {name}", found)
    if value <= 0:
        raise SettingsError(f"by PEFT's settings {patterns.partition('_')[0]} of {name} is {value:g}, not above 0")
    return value


def means(pattern: str, name: str) -> bool:
    """Whether a pattern of PEFT's means a layer."""
    return regex.match(rf"(.*\.)?({pattern})$", name, timeout=PATTERN_SECONDS) is not None


def fitted(
    part: nn.Module, name: str, state: dict[str, AdapterLayer], path: Path, frozen: bool
) -> dict[str, AdapterLayer]:
    """The layers in the shapes of a network's weights, fp32.

    Args:
        frozen: the magnitudes are for the frozen rows' lengths.

    Raises:
        SettingsError: some belong to weights of other sizes; they are listed.
    """
    wrong = []
    fitting = {}
    for key, layer in state.items():
        weight: Tensor = part.get_parameter(f"{key}.weight")
        outputs, inputs = matrix_shape(layer)
        if outputs != weight.shape[0] or inputs not in (None, weight[0].numel()):
            wrong.append(f"{name}.{key} ({outputs}x{inputs}, not {weight.shape[0]}x{weight[0].numel()})")
        else:
            fitting[key] = laid_out(layer, weight, frozen)
    if wrong:
        raise SettingsError(
            f"method.from_file={path} was trained on another model: {len(wrong)} of its layers have other sizes: "
            f"{listed(wrong)}"
        )
    return fitting


def laid_out(layer: AdapterLayer, weight: Tensor, frozen: bool) -> AdapterLayer:
    """The layer in fp32; a LoRA's matrices with or without a kernel, as the weight has it."""
    layer = converted(layer, torch.float32)
    if weight.device.type == "meta":  # a plan, which has no weights
        layer = converted(layer, "meta")
    if not isinstance(layer, LoraLayer):
        return layer
    rank, ones = layer.down.shape[0], [1] * (weight.dim() - 2)
    down, up = layer.down.reshape(rank, *weight.shape[1:]), layer.up.reshape(-1, rank, *ones)
    return with_lengths(replace(layer, down=down, up=up, frozen_lengths=frozen), weight, frozen=False)
