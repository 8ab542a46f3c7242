"""What Wuerstchen and Stable Cascade share: a prior over an EfficientNet's latents, and decoders only for drawing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import DDPMWuerstchenScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from otl import agreement, loss
from otl.config import LossWeight, SettingsError, assets_dir
from otl.cosine import Cosine
from otl.formats import cascade
from otl.formats.stored import Stored
from otl.modules import fetching, loading
from otl.modules.base import DiffusionModule
from otl.modules.efficientnet import EfficientNetEncoder
from otl.modules.networks import fingerprint
from otl.modules.stable_diffusion import without_autocast
from otl.types import Cond, Dtype, Size

# A picture is shrunk before it is encoded: 1024 pixels become 768, and those 24 latents; 512 became 384 in Wuerstchen's
# training code. So a latent stands for 42.67 pixels, the resolution_multiple of the stock pipelines.
SHRINK = (3, 4)


class CascadedModule(DiffusionModule):
    """A prior that predicts the noise on an image encoder's latents; two decoders make pixels of them.

    The decoders (stage B, a diffusion too, and stage A, a VQGAN) are never trained: they are loaded to draw, and let
    go. All parts are loaded one by one: diffusers cannot load each of these pipelines as a whole any more.

    Args:
        checkpoint: hub name or folder with the prior and its text encoder.
        effnet: the image encoder: .safetensors file, also as `owner/name/file.safetensors` on the hub, or folder or
            hub name in diffusers' layout.
        decoder: hub name or folder with the decoders, for drawing; None: nothing can be drawn.
        dtype: of the frozen weights: "fp32", "bf16", "fp16", or "auto" for the precision's own.
        p2_gamma: exponent of the loss weight of the original training, (1 + snr) ** -gamma, which holds where
            loss.weight=constant; 0: none.
        gradient_checkpointing: compute activations twice instead of keeping them: less memory, about a third slower.
    """

    part_names = ("prior", "text_encoder", "effnet")
    denoiser = "prior"
    image_encoder = "effnet"
    resolution = 1024
    bucket_step = 128  # three quarters of it are 3 latents
    guidance = 4.0
    prior_class: ClassVar[Any]
    text_class: ClassVar[Any]
    decoder_class: ClassVar[Any]  # the stock pipeline of the decoders
    decoder_parts: ClassVar[dict[str, Any]]  # its networks
    time_embedding: ClassVar[str]  # the prior's method that embeds times
    latent_scale: ClassVar[float] = 1.0  # the image encoder gives, and the decoders read, latents * scale - shift
    latent_shift: ClassVar[float] = 0.0

    def __init__(
        self,
        checkpoint: str,
        *,
        effnet: str,
        decoder: str | None = None,
        dtype: Dtype = "auto",
        p2_gamma: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(checkpoint, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
        self.effnet, self.decoder, self.p2_gamma = effnet, decoder, p2_gamma
        self.decoders: Any = None  # their pipeline, while they are needed

    @classmethod
    def part_classes(cls) -> dict[str, Any]:
        return {"prior": cls.prior_class, "text_encoder": cls.text_class, "effnet": EfficientNetEncoder}

    def original_names(self, paths: list[str]) -> dict[str, list[str]]:
        return cascade.original_names(paths)

    # Loading

    def source(self, name: str) -> tuple[str, str]:
        """Hub name or folder of a part, and the setting that gave it."""
        return self.checkpoint, "model.checkpoint"

    def subfolders(self, name: str) -> tuple[str, ...]:
        """Where a part may lie in its repository; the first that is there is taken."""
        return (name,)

    def load_pipeline(self, without: Sequence[str] = ()) -> Any:
        """The small parts first, so that what is missing is told in seconds."""
        self.require_decoders()
        parts = {name: None if name in without else self.load_part(name) for name in reversed(self.part_names)}
        return self.assembled(parts)

    def load_part(self, name: str) -> nn.Module:
        if name == self.image_encoder:
            return fetching.fetch_encoder(self.effnet)
        source, setting = self.source(name)
        part_class, dtype = self.part_classes()[name], self.dtype_of(name)
        return fetching.fetch(part_class, source, self.subfolders(name), setting=setting, dtype=dtype)

    def stored_part(self, name: str) -> Stored | None:
        source, setting = self.source(name)
        subfolder, _ = fetching.place(source, self.subfolders(name), setting=setting)
        return loading.stored(self.part(name), source, subfolder)

    def dtype_of(self, name: str) -> torch.dtype:
        dtypes = self.part_dtypes()
        return dtypes.get(name, dtypes["default"])

    def load_other(self, part_class: Any, name: str) -> Any:
        """Tokenizer or scheduler."""
        source, setting = self.source(name)
        return fetching.fetch_other(part_class, source, name, setting=setting)

    def assembled(self, parts: dict[str, nn.Module | None]) -> Any:
        """The stock pipeline; the image encoder, of which it knows nothing, is an attribute beside its parts."""
        effnet = parts.pop("effnet")
        pipeline = self.pipeline_class(
            **parts,
            tokenizer=self.load_other(CLIPTokenizer, "tokenizer"),
            scheduler=self.load_other(DDPMWuerstchenScheduler, "scheduler"),
            **self.pipeline_options,
        )
        pipeline.effnet = effnet
        return pipeline

    def load_skeleton(self) -> SimpleNamespace:
        """From the configs that ship with OTL, but those of the networks from their folders where they lie here."""
        if self.sample_options.prompts:
            self.required_decoder()
            self.require_size()
        own = assets_dir() / "configs" / self.config_name
        parts = {}
        for name in ("prior", "text_encoder"):
            source, setting = self.source(name)
            parts[name] = fetching.meta_from(
                source, self.subfolders(name), self.part_classes()[name], setting=setting, otherwise=own / name
            )
        scheduler = json.loads((own / "scheduler" / "scheduler_config.json").read_text())
        return SimpleNamespace(
            **parts,
            effnet=fetching.meta_encoder(self.effnet),
            tokenizer=loading.ShapeTokenizer(own / "tokenizer" / "tokenizer_config.json"),
            scheduler=SimpleNamespace(config=scheduler),
        )

    def prepare(self) -> None:
        embed_times_exactly(self.part("prior"), self.time_embedding)
        super().prepare()

    # Pictures, words, noise and loss

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> [B, 16, H * 3 / 128, W * 3 / 128] float32, never under autocast."""
        by, of = SHRINK
        effnet = self.part("effnet")
        small = F.interpolate(
            pixels.to(next(effnet.parameters()).device, torch.float32),
            size=[side * by // of for side in pixels.shape[-2:]],
            mode="bilinear",
            antialias=True,
        )
        with without_autocast(pixels):
            return (effnet(small).float() + self.latent_shift) / self.latent_scale

    def image_identity(self) -> str:
        return fingerprint(self.part("effnet"), f"{SHRINK} {self.latent_scale} {self.latent_shift}")

    def prompt_room(self) -> int:
        return self.pipeline.tokenizer.model_max_length - 2

    def tokens(self, captions: list[str]) -> dict[str, Tensor | None]:
        """[B, 77] ids, and the mask that hides the padding from the text encoder."""
        tokenizer = self.pipeline.tokenizer
        found = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        ids, mask = (each.to(self.device, non_blocking=True) for each in (found.input_ids, found.attention_mask))
        return {"input_ids": ids, "attention_mask": None if mask.is_meta else mask}  # the mask's values are asked for

    def cosine(self, **options: Any) -> Cosine:
        """The cosine schedule of the checkpoint's scheduler.

        Raises:
            SettingsError: it bends the schedule, as none of the published do.
        """
        config = self.pipeline.scheduler.config
        if config.get("scaler", 1.0) != 1.0:
            raise SettingsError(
                f"model.checkpoint={self.checkpoint}: its scheduler has scaler={config['scaler']}; only 1.0 is trained"
            )
        return Cosine(s=config["s"], **options)

    def timestep_weight(self, t: Tensor) -> Tensor | None:
        """(1 + snr) ** -gamma as in the original training, unless loss.weight says otherwise: P2 with k = 1
        (https://arxiv.org/abs/2204.00227)."""
        if self.loss_options.weight is not LossWeight.constant:
            return super().timestep_weight(t)
        return loss.snr_weight(self.noise_schedule.snr(t), weight="p2", gamma=self.p2_gamma, prediction="epsilon")

    # Drawing

    def sample(
        self, cond: Cond, uncond: Cond, *, generators: list[torch.Generator], steps: int, guidance: float, size: Size
    ) -> Tensor:
        self.pipeline.set_progress_bar_config(disable=True)
        words = self.prompt_arguments(cond, uncond)
        if guidance <= 1:  # the stock pipelines would put them beside the prompts all the same
            words = {name: value for name, value in words.items() if not name.startswith("negative_")}
        with self.text_encoder_away():
            found = self.pipeline(
                **words,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                height=size.h,
                width=size.w,
                output_type="pt",
            ).image_embeddings
        return (found + self.latent_shift) / self.latent_scale

    @contextlib.contextmanager
    def text_encoder_away(self) -> Iterator[None]:
        """The stock pipelines ask the text encoder's dtype even for encoded prompts, and its device before others."""
        mixed = self.autocast_dtype is not None
        dtype = torch.float32 if mixed else next(self.part("prior").parameters()).dtype
        attributes = vars(self.pipeline)
        own, attributes["text_encoder"] = attributes["text_encoder"], SimpleNamespace(dtype=dtype)
        try:
            yield
        finally:
            attributes["text_encoder"] = own

    def decode_image(self, latents: Tensor) -> Tensor:
        """As for the empty prompt and the seed 0: decoding is a diffusion too."""
        generators = [torch.Generator().manual_seed(0) for _ in latents]
        return self.decode_sample(latents, [""] * len(latents), generators=generators)

    def decode_sample(self, latents: Tensor, prompts: list[str], *, generators: list[torch.Generator]) -> Tensor:
        embeddings = latents * self.latent_scale - self.latent_shift
        with self.decoding(), without_autocast(latents):
            pictures = [  # one by one: Wuerstchen's stock pipeline repeats the prompts of a batch once too often
                self.decoders(
                    image_embeddings=embeddings[row : row + 1].to(self.decoders.decoder.dtype),
                    generator=generators[row : row + 1],
                    output_type="pt",
                    **self.decoder_arguments(prompt),
                ).images
                for row, prompt in enumerate(prompts)
            ]
        return torch.cat(pictures).float() * 2 - 1

    def decoder_arguments(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments by which the decoders' pipeline takes one prompt."""
        raise NotImplementedError

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """The decoders are in memory for the time of the outermost block."""
        if self.decoders is not None:
            yield
            return
        self.decoders = self.load_decoders().to(self.device)
        self.decoders.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            self.decoders = None

    def decoder_subfolders(self, name: str) -> tuple[str, ...]:
        return (name,)

    def load_decoders(self) -> Any:
        """The stock pipeline of the decoders, on the CPU.

        Raises:
            SettingsError: model.decoder is null, or they are not there.
        """
        decoder, setting = self.required_decoder(), "model.decoder"
        dtype = self.part_dtypes()["default"]
        parts = {
            name: fetching.fetch(part_class, decoder, self.decoder_subfolders(name), setting=setting, dtype=dtype)
            for name, part_class in self.decoder_parts.items()
        }
        scheduler = fetching.fetch_other(DDPMWuerstchenScheduler, decoder, "scheduler", setting=setting)
        return self.decoder_class(**parts, **self.decoder_words(decoder), scheduler=scheduler)

    def decoder_words(self, decoder: str) -> dict[str, Any]:
        """What the decoders' pipeline reads prompts with, besides its networks."""
        raise NotImplementedError

    def require_decoders(self) -> None:
        """Raises SettingsError: pictures will be drawn, and the decoders are not there."""
        if self.sample_options.prompts:
            decoder = self.required_decoder()
            for name in self.decoder_parts:
                fetching.require_reachable(decoder, self.decoder_subfolders(name), setting="model.decoder")

    def require_size(self) -> None:
        """Raises SettingsError: the decoders cannot make a picture of the size that is asked for."""
        agreement.require_sides(self.sample_options.height, self.sample_options.width, step=self.bucket_step)

    def required_decoder(self) -> str:
        return agreement.require_decoder(self.decoder)


def embed_times_exactly(prior: nn.Module, method: str) -> None:
    """Let a prior embed its times in fp32, whatever its weights are in: they are multiplied by 10000, and in bf16
    neighbours would be up to 40 apart."""
    embed = getattr(prior, method)
    setattr(prior, method, lambda t: embed(t.float()).to(next(prior.parameters()).dtype))
