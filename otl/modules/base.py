"""The family is the LightningModule: what one says of itself, and how it draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from otl import agreement, loss, noise
from otl.config import (
    Inpaint,
    Loss,
    NoiseOptions,
    Output,
    SampleOptions,
    Sampler,
    TimestepSpacing,
)
from otl.formats.single_file import TextLayout
from otl.modules import drawing, inpainting
from otl.modules.networks import Networks
from otl.modules.training import Training
from otl.types import Batch, Cond, Dtype, Method, Noise, ParamGroup, Prediction, Problem, Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from otl.methods.embeddings import Embeddings


class DiffusionModule(Networks, Training):
    """What all families share. A family says the rest: the class attributes below and five methods.

    Args:
        checkpoint: hub name, diffusers folder or .safetensors file.
        config: folder under otl/assets/configs that describes the networks where the checkpoint is no folder itself;
            None: the family's own.
        native_resolution: pixels per side that the weights were trained at; None: the family's usual.
        dtype: of the frozen weights: "fp32", "bf16", "fp16", or "auto" for the precision's own.
        prediction: "epsilon", "v_prediction" or "sample"; None: as the checkpoint's scheduler says.
        zero_terminal_snr: whether the last timestep is pure noise; None: as the checkpoint's scheduler says.
        gradient_checkpointing: compute activations twice instead of keeping them: less memory, about a third slower.
    """

    pipeline_class: ClassVar[Any]  # the stock diffusers pipeline
    pipeline_options: ClassVar[dict[str, Any]] = {}  # for its from_pretrained
    inpaint_pipeline_class: ClassVar[Any] = None  # the stock pipeline for 9 input channels; None: there is none
    part_names: ClassVar[tuple[str, ...]]  # the networks of the pipeline
    denoiser: ClassVar[str]  # which of them predicts the noise
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction", "sample")  # what it may be trained to predict
    single_step: ClassVar[bool] = True  # whether its stock pipeline draws in one step with any sampler
    learned_variance: ClassVar[bool] = False  # whether it also predicts the variance, in as many channels behind
    image_encoder: ClassVar[str] = "vae"
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    prompt_tokens: ClassVar[int | None] = None  # that a prompt is cut to, without its ends; None: as its tokenizer says
    encodes_ahead: ClassVar[bool] = False  # whether the text encoders are too large to lie beside the denoiser
    resolution: int  # pixels per side that the published weights were trained at
    bucket_step: ClassVar[int]  # sides of buckets are multiples of it, pixels
    guidance: ClassVar[float]  # classifier-free guidance scale that pictures are usually drawn with; 1 is none
    config_name: str  # folder under otl/assets/configs
    file_keys: ClassVar[tuple[str, ...]] = ()  # keys by which a single-file checkpoint is known
    foreign_keys: ClassVar[tuple[str, ...]] = ()  # keys by which one of a related family is known
    writes_file: ClassVar[bool] = False  # whether `single_file` gives the whole model
    file_texts: ClassVar[dict[str, tuple[TextLayout, str]]] = {}  # text encoder -> its spelling and prefix in files
    file_implementation: ClassVar[str] = "https://github.com/Stability-AI/generative-models"  # modelspec, of that file
    lora_targets: ClassVar[dict[str, dict[str, list[str]]]]  # part -> preset -> patterns
    kohya_prefixes: ClassVar[dict[str, str]]  # part -> prefix of its keys in a LoRA file
    embedding_keys: ClassVar[dict[str, str]] = {"text_encoder": "emb_params"}  # text encoder -> key in a file
    architecture: ClassVar[str]  # modelspec id
    inpaint_architecture: ClassVar[str | None] = None  # of a whole model with 9 input channels; None: the same
    base_model_version: ClassVar[str]  # kohya's id, ss_base_model_version
    implementation: ClassVar[str] = "diffusers"  # modelspec: whose names the keys of a kohya file follow

    def __init__(
        self,
        checkpoint: str,
        *,
        config: str | None = None,
        native_resolution: int | None = None,
        dtype: Dtype = "auto",
        prediction: Prediction | None = None,
        zero_terminal_snr: bool | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold trained weights only
        self.checkpoint, self.dtype_name = checkpoint, dtype
        if config is not None:
            self.config_name = config
        if native_resolution is not None:
            self.resolution = native_resolution
        self.prediction, self.zero_terminal_snr = prediction, zero_terminal_snr
        self.gradient_checkpointing = gradient_checkpointing
        # What the run adds: tasks/run.py and tasks/train.py set these before the Trainer starts.
        self.method: Method | None = None
        self.optimizer: Callable[..., torch.optim.Optimizer] | None = None
        self.lr_schedule: Callable[..., float] | None = None
        self.loss_options: Loss = Loss()
        self.noise_options: NoiseOptions = NoiseOptions()
        self.sample_options: SampleOptions = SampleOptions()
        self.inpaint_options: Inpaint = Inpaint()
        self.output_options: Output = Output()
        self.seed = 0
        self.total_steps = 0  # optimizer steps of the whole run
        self.steps_per_epoch = 0  # optimizer steps
        self.run_dir = Path()
        self.data_resolution = self.resolution
        self.settings: dict[str, Any] = {}  # the resolved config, kept in checkpoints
        self.precision_name = ""  # as Lightning calls it, kept there too
        self.dataset: list[list[str]] = []  # name and digest of each image, kept there too
        self.autocast_dtype: torch.dtype | None = None
        self.average: dict[str, Tensor] | None = None  # set by callbacks/ema.py
        self.pipeline: Any = None  # a plain attribute: Lightning sees only what trains
        self.groups: list[ParamGroup] = []
        self.embeddings: Embeddings | None = None  # the new words, where the method has any
        self.trained = nn.ModuleDict()
        self.stopped: list[ParamGroup] = []  # what takes no part in the next optimizer step
        self.text_stopped = False  # whether nothing that trains lies before the conditioning any more
        self.released: set[str] = set()  # parts without weights
        self.kept_identity: str | None = None  # what `prompt_identity` was before
        self.kept_prompts: dict[str, Cond] = {}  # what to draw, encoded before the text encoders were let go

    # What a family says

    def make_noise(self) -> Noise:
        """The noise schedule of the loaded checkpoint.

        Raises:
            SettingsError: as `agreement.require_prediction`.
        """
        agreement.require_prediction(
            self.prediction or self.pipeline.scheduler.config.get("prediction_type", "epsilon"),
            self.predictions,
            zero_snr=self.zero_terminal_snr,
            family=type(self).__name__,
        )
        return noise.Discrete.from_scheduler(
            self.pipeline.scheduler.config,
            prediction=self.prediction,
            zero_snr=self.zero_terminal_snr,
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> latents [B, C, h, w], scaled as the denoiser expects."""
        raise NotImplementedError

    def decode_image(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] as the denoiser gives them -> pixels [B, 3, H, W] in -1..1."""
        raise NotImplementedError

    def encode_prompt(self, captions: list[str]) -> Cond:
        """B captions -> conditioning, axis 0 is the batch."""
        raise NotImplementedError

    def spelled(self, caption: str) -> str:
        """A caption as the tokenizer is given it."""
        return caption

    def prompt_room(self) -> int | None:
        """Tokens of a prompt that are read, without those that begin and end it; None: it is not known."""
        return None

    def prompt_advice(self, tokens: int) -> str:
        """What else than shortening them helps with prompts of so many tokens; empty: nothing."""
        return ""

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """[B, C, h, w] noisy latents at timesteps [B] -> the denoiser's prediction, same shape."""
        raise NotImplementedError

    def objective(
        self,
        predicted: Tensor,
        latents: Tensor,
        clean: Tensor,
        noisy: Tensor,
        t: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """[B] unweighted loss of each sample.

        Args:
            predicted: what `predict` gave for `noisy`.
            latents, clean: [B, C, h, w] the picture and the noise that is on it.
            noisy: [B, C, h, w] both mixed.
            t: [B] timesteps, on the CPU.
            weights: [B, 1, h, w] of each position; None: all alike.
        """
        return self.distance(predicted, self.noise_schedule.target(latents, clean, t), t, weights)

    def distance(self, predicted: Tensor, target: Tensor, t: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B] the distance of the settings (`loss.type` or `loss.mix`) between two [B, C, h, w]; see `objective`."""
        return loss.distance(
            predicted,
            target,
            factors=loss.factors(self.loss_options),
            huber_delta=loss.huber_delta(self.loss_options, self.noise_schedule, t),
            weights=weights,
        )

    def timestep_weight(self, t: Tensor) -> Tensor | None:
        """[B] timesteps -> [B] multipliers of the loss; None where all are 1."""
        return loss.timestep_weight(self.loss_options, self.noise_schedule, t)

    def prompt_arguments(self, cond: Cond, uncond: Cond) -> dict[str, Any]:
        """Keyword arguments by which the stock pipeline takes encoded prompts and negative prompts."""
        names = {"hidden": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
        arguments = {names[key]: value for key, value in cond.items()}
        return arguments | {f"negative_{names[key]}": value for key, value in uncond.items()}

    def sample(
        self, cond: Cond, uncond: Cond, *, generators: list[torch.Generator], steps: int, guidance: float, size: Size
    ) -> Tensor:
        """Conditionings of B prompts and of what to stay away from -> [B, C, h, w] latents, by the stock pipeline."""
        self.pipeline.set_progress_bar_config(disable=True)
        with drawing.without_text_encoders(self):
            return self.pipeline(
                **self.prompt_arguments(cond, uncond),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                height=size.h,
                width=size.w,
                output_type="latent",
            ).images

    def decode_sample(self, latents: Tensor, prompts: list[str], *, generators: list[torch.Generator]) -> Tensor:
        """What `sample` gave -> pixels [B, 3, H, W] in -1..1; some families' decoders read the prompts too."""
        return self.decode_image(latents)

    def decoding(self) -> contextlib.AbstractContextManager[None]:
        """Around all calls of `decode_sample` for one drawing: for decoders that are in memory only then."""
        return contextlib.nullcontext()

    @classmethod
    def part_classes(cls) -> dict[str, Any]:
        """part -> class of the network, to build it without weights."""
        raise NotImplementedError

    def single_file(self) -> Mapping[str, Tensor]:
        """The whole model under the names of the original code's files; a family that has such says `writes_file`."""
        raise NotImplementedError

    def denoiser_names(self, paths: list[str]) -> dict[str, str]:
        """Paths of the denoiser's layers -> their spelling in a LoRA file."""
        return {path: path for path in paths}

    def original_names(self, paths: list[str]) -> dict[str, list[str]]:
        """The original code's spellings in the LoRA files of others, where they differ -> the paths of the denoiser's
        layers whose weights it has in one, in their order."""
        return {}

    def advice(self) -> Iterable[Problem]:
        """What the settings lead to in this family, where it is not what one would expect; known by the plan."""
        return ()

    # Pictures and files

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        negative_prompt: str = "",
        steps: int = 25,
        guidance: float | None = None,
        size: Size | None = None,
        batch_size: int = 4,
        sampler: Sampler | None = None,
        timestep_spacing: TimestepSpacing | None = None,
        canvases: list[inpainting.Canvas] | None = None,
    ) -> list[Image]:
        """One picture for each pair of prompt and seed, by the stock pipeline. The same on every call.

        Args:
            guidance: None: the family's usual.
            sampler, timestep_spacing: None: the checkpoint's own.
            canvases: what an inpainting model paints in, one for each pair; None: all of an empty picture.
        """
        return drawing.draw(
            self,
            prompts,
            seeds,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=self.guidance if guidance is None else guidance,
            size=size or Size(self.data_resolution, self.data_resolution),
            batch_size=batch_size,
            sampler=sampler,
            timestep_spacing=timestep_spacing,
            canvases=canvases,
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The Trainer's mixed precision, for what runs outside of its steps."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def sampling_scheduler(self) -> contextlib.AbstractContextManager[None]:
        """The pipeline's scheduler made to agree with how the run trains, for the time of the block."""
        return drawing.sampling_scheduler(self)

    def export(self, path: Path) -> Path:
        """Write what was trained to `path` (without suffix), verified; returns the file or folder."""
        assert self.method is not None
        return self.method.export(self, path)
