"""Stable Cascade: stage C, of 3.6B or 1B."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, PreTrainedModel

from otl import agreement
from otl.config import SettingsError, assets_dir
from otl.cosine import CLAMP, Cosine
from otl.formats.cascade import joined, lora_name, read_prior, read_text, stored_text
from otl.formats.stored import Stored, of_network
from otl.modules import drawing, loading
from otl.modules.cascaded import CascadedModule
from otl.modules.stable_diffusion import CLIP_TARGETS
from otl.types import Batch, Cond, Noise

TARGETS = {  # clip_img_mapper reads zeros only: an adapter on it would stay nothing
    "attn-mlp": [r"attention", r"channelwise"],
    "attn-only": [r"attention"],
    "full": [r"^(?!clip_img_mapper)"],
    "blocks": [r"(down|up)_blocks"],
    "down-blocks": [r"down_blocks"],
    "up-blocks": [r"up_blocks"],
    "mapper": [r"(?<!clip_img_)mapper"],
}
TEXT_TARGETS = {preset: [r"layers"] for preset in TARGETS} | CLIP_TARGETS  # of the other presets: all of it


class StableCascade(CascadedModule):
    """A two-level UNet over 16 x 24 x 24 latents, led by the last layer of OpenCLIP bigG and its pooled vector.

    As in the original training (github.com/Stability-AI/StableCascade, train/train_c.py): t = u + 0.001, and where the
    schedule is clamped the denoiser is told the time at which the clamp begins, so that a time always means one noise;
    the squared error of the noise times 1 / (1 + snr); dropout of 0.1; and data.caption_dropout=0.05, which is for the
    user to set. Unlike there, the image condition is always zero, as it was for nine samples in ten. A dropped caption
    is the empty one, as there; OneTrainer multiplies what the text encoder gives by 0 instead.

    Args:
        checkpoint: hub name or folder with the prior and its text encoder, or a single file of stage C.
        effnet: the image encoder: .safetensors file, also as `owner/name/file.safetensors` on the hub, or folder or
            hub name in diffusers' layout.
        decoder: hub name or folder with the decoders, for drawing; None: nothing can be drawn.
        lite: the 1B prior and the 700M decoder, `prior_lite` and `decoder_lite` of the published repositories.
        text_encoder: hub name or folder with text encoder and tokenizer, where the checkpoint is a single file.
        dtype: of the frozen weights: "fp32", "bf16", or "auto" for the precision's own.
        p2_gamma: exponent of the loss weight of the original training, (1 + snr) ** -gamma, which holds where
            loss.weight=constant; 0: none.
        gradient_checkpointing: compute activations twice instead of keeping them: less memory, about a third slower.
    """

    pipeline_class = StableCascadePriorPipeline
    prior_class = StableCascadeUNet
    text_class = CLIPTextModelWithProjection
    decoder_class = StableCascadeDecoderPipeline
    decoder_parts = {"vqgan": PaellaVQModel, "decoder": StableCascadeUNet}
    time_embedding = "get_timestep_ratio_embedding"
    config_name = "stable_cascade"
    file_implementation = "https://github.com/Stability-AI/StableCascade"
    writes_file = True
    lora_targets = {"prior": TARGETS, "text_encoder": TEXT_TARGETS}
    kohya_prefixes = {"prior": "lora_prior_unet", "text_encoder": "lora_prior_te"}
    embedding_keys = {"text_encoder": "clip_g"}
    architecture = "stable-cascade-v1-stage-c"
    base_model_version = "stable_cascade"

    def __init__(
        self,
        checkpoint: str,
        *,
        effnet: str,
        decoder: str | None = None,
        lite: bool = False,
        text_encoder: str = "stabilityai/stable-cascade-prior",
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        p2_gamma: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            checkpoint,
            effnet=effnet,
            decoder=decoder,
            dtype=dtype,
            p2_gamma=p2_gamma,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.lite, self.text_encoder = lite, text_encoder
        if lite:
            self.config_name = "stable_cascade_lite"

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """Raises SettingsError: fp16, in which the prior overflows."""
        if self.dtype_name == "fp16":
            raise SettingsError(
                "model.dtype=fp16: Stable Cascade's prior overflows in it; set model.dtype=bf16 or fp32"
            )
        if self.autocast_dtype == torch.float16:
            agreement.require_no_fp16("16-mixed")
        return super().part_dtypes()

    def subfolders(self, name: str) -> tuple[str, ...]:
        return ("prior_lite", "prior") if self.lite and name == "prior" else (name,)

    def decoder_subfolders(self, name: str) -> tuple[str, ...]:
        return ("decoder_lite", "decoder") if self.lite and name == "decoder" else (name,)

    @property
    def file(self) -> Path | None:
        """The checkpoint, if it is a single file."""
        path = Path(self.checkpoint).expanduser()
        return path if path.is_file() else None

    def source(self, name: str) -> tuple[str, str]:
        """A file holds the prior and sometimes the text encoder; the rest comes from elsewhere."""
        return super().source(name) if self.file is None else (self.text_encoder, "model.text_encoder")

    def load_part(self, name: str) -> nn.Module:
        if self.file is None or name == self.image_encoder:
            return super().load_part(name)
        state = read_prior(self.file) if name == self.denoiser else read_text(self.file)
        if name == self.denoiser and not state:
            raise SettingsError(
                f"model.checkpoint={self.file}: not a file of Stable Cascade's stage C. Choose the model= it belongs to"
            )
        if not state:
            return super().load_part(name)
        dtypes = self.part_dtypes()
        config = assets_dir() / "configs" / self.config_name / name
        return filled(
            self.part_classes()[name], config, state, dtype=dtypes.get(name, dtypes["default"]), file=self.file
        )

    def load_other(self, part_class: Any, name: str) -> Any:
        alone = self.file is not None and name == "scheduler"
        return DDPMWuerstchenScheduler() if alone else super().load_other(part_class, name)

    def stored_part(self, name: str) -> Stored | None:
        own = Stored({}) if self.file is None else stored_text(self.file)
        return of_network(self.part(name), own) if own else super().stored_part(name)

    def single_file(self) -> Stored:
        """Prior and text encoder, as ComfyUI loads them for stage C."""
        return joined(self.part("prior").state_dict(), self.weights("text_encoder"))

    def denoiser_names(self, paths: list[str]) -> dict[str, str]:
        """The names that ComfyUI looks for."""
        return {path: lora_name(path) for path in paths}

    # The formulas

    def make_noise(self) -> Noise:
        clamps = Cosine(s=self.pipeline.scheduler.config["s"])
        return self.cosine(limits=(clamps.time(CLAMP[1]), clamps.time(CLAMP[0])))

    def encode_prompt(self, captions: list[str]) -> Cond:
        """{"hidden": [B, 77, 1280] of the last layer without the final norm, "pooled": [B, 1280]}."""
        found = self.pipeline.text_encoder(**self.tokens(captions), output_hidden_states=True)
        return {"hidden": found.hidden_states[-1], "pooled": found.text_embeds}

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        prior = self.pipeline.prior
        dtype = next(prior.parameters()).dtype  # prior.dtype goes through all of them: milliseconds
        image = torch.zeros(len(noisy), 1, prior.config.clip_image_in_channels, dtype=dtype, device=noisy.device)
        return prior(
            noisy.to(dtype),
            t,
            clip_text_pooled=cond["pooled"].to(dtype)[:, None],
            clip_text=cond["hidden"].to(dtype),
            clip_img=image,
        ).sample

    def prompt_arguments(self, cond: Cond, uncond: Cond) -> dict[str, Any]:
        return {
            "prompt_embeds": cond["hidden"],
            "prompt_embeds_pooled": cond["pooled"][:, None],
            "negative_prompt_embeds": uncond["hidden"],
            "negative_prompt_embeds_pooled": uncond["pooled"][:, None],
        }

    def decoder_words(self, decoder: str) -> dict[str, Any]:
        """None: stage B reads the pooled vector of the prior's own text encoder."""
        return {"tokenizer": None, "text_encoder": None}

    def decoder_arguments(self, prompt: str) -> dict[str, Any]:
        cond = drawing.encoded(self, [prompt], batch_size=1)[prompt]
        own = {"device": self.device, "dtype": self.decoders.decoder.dtype}
        return {
            "prompt_embeds": cond["hidden"][None].to(**own),
            "prompt_embeds_pooled": cond["pooled"][None, None].to(**own),
        }


def filled(part_class: Any, config: Path, state: dict[str, Tensor], *, dtype: torch.dtype, file: Path) -> nn.Module:
    """A network of its config and its weights.

    Raises:
        SettingsError: they do not belong together.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in loading.meta_part(config, part_class).state_dict().items()}
    wrong = [name for name, shape in shapes.items() if name not in state or state[name].shape != shape]
    if wrong:
        raise SettingsError(
            f"model.checkpoint={file}: {len(wrong)} weights of the {part_class.__name__} are missing or of another "
            f"size, such as {wrong[0]}: the 3.6B prior is model=stable_cascade, the 1B one model=stable_cascade_lite"
        )
    kept = {name: state[name] for name in shapes}
    if issubclass(part_class, PreTrainedModel):  # its buffers are not in the file
        settings = part_class.config_class.from_pretrained(config)
        return part_class.from_pretrained(None, config=settings, state_dict=kept, dtype=dtype)
    with torch.device("meta"):
        part = loading.meta_part(config, part_class)
    part.load_state_dict(kept, assign=True)
    return part.to(dtype)
