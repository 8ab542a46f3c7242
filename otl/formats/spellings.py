"""Every name under which the adapter files of the world know a layer, and how their keys end."""

from __future__ import annotations

from collections.abc import Iterable

from otl.formats.lora import KOHYA, PEFT, by_end, kohya_key, portable_text_path
from otl.types import AdapterLayer, LoraLayer

COMFY_CLIPS = {"clip_l": 0, "clip_h": 0, "clip_g": -1, "t5xxl": 0}  # ComfyUI's name -> which of the text encoders
OTHER_ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",  # diffusers before 0.22
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers before 0.19, below `.processor`
    "_lora.up.weight": "up",
    ".lora_A.default.weight": "down",  # a live PEFT model's own state
    ".lora_B.default.weight": "up",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
}


def all_ends() -> dict[str, tuple[type[AdapterLayer], str]]:
    """How a key may end -> kind of layer and field."""
    others: dict[str, tuple[type[AdapterLayer], str]] = {end: (LoraLayer, field) for end, field in OTHER_ENDS.items()}
    return others | by_end(KOHYA) | by_end(PEFT)


def denoiser_stems(part: str, paths: Iterable[str], *, prefix: str) -> set[str]:
    """What a key of a denoiser's layer may begin with.

    Args:
        part: diffusers' name of the network: "unet", "transformer", "prior".
        paths: of the layer: diffusers', the original code's, the family's own.
        prefix: of the family's own files.
    """
    paths = set(paths)
    flat = {"lora_unet", "oft_unet", "lora_prior_unet", f"lora_{part}", "lycoris", prefix.rstrip(".")}
    dotted = {f"{part}.", "base_model.model.", "diffusion_model.", "model.diffusion_model.", "transformer.", ""}
    stems = {kohya_key(one, spelled) for one in flat for spelled in paths}
    stems |= {f"{one}{spelled}" for one in dotted for spelled in paths}
    processors = {processor_path(path) for path in paths} - {""}
    return stems | {f"{one}{path}" for one in (f"{part}.", "") for path in processors}


def processor_path(path: str) -> str:
    """attn1.to_q -> attn1.processor.to_q, as diffusers before 0.19 named attention; "" for other layers."""
    attention, _, layer = path.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{layer}" if layer in {"to_q", "to_k", "to_v", "to_out"} else ""


def text_stems(part: str, path: str, *, prefix: str, position: int, count: int) -> set[str]:
    """What a key of a text encoder's layer may begin with.

    Args:
        part: diffusers' name of the text encoder.
        path: of the layer in the live one.
        prefix: of the family's own files.
        position: of the text encoder among the family's.
        count: text encoders that the family has.
    """
    paths = {path, portable_text_path(path)}
    clips = {name for name, index in COMFY_CLIPS.items() if index % count == position}
    flat = {prefix.rstrip("."), f"lora_te{position + 1}"} | ({"lora_te", "lora_prior_te"} if count == 1 else set())
    dotted = {f"{part}.", *(f"text_encoders.{clip}.transformer." for clip in clips)}
    return {kohya_key(one, spelled) for one in flat for spelled in paths} | {
        f"{one}{spelled}" for one in dotted for spelled in paths
    }
