"""The family is the LightningModule: loading, the training and validation step, optimizer groups and sampling."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from otl import loss, noise, rng
from otl.config import Inpaint, Loss, NoiseOptions, Output, SampleOptions, SettingsError
from otl.modules import ahead, drawing, inpainting, loading, prior, stopping
from otl.timesteps import Timesteps
from otl.types import Batch, Cond, Method, Noise, ParamGroup, Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from otl.methods.embeddings import Embeddings

VALIDATION_TIMESTEPS = 4  # forward passes for each held-out image, at evenly spaced timesteps
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusionModule(LightningModule):
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
    learned_variance: ClassVar[bool] = False  # whether it also predicts the variance, in as many channels behind
    image_encoder: ClassVar[str] = "vae"
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    encodes_ahead: ClassVar[bool] = False  # whether the text encoders are too large to lie beside the denoiser
    resolution: int  # pixels per side that the published weights were trained at
    bucket_step: ClassVar[int]  # sides of buckets are multiples of it, pixels
    config_name: str  # folder under otl/assets/configs
    file_keys: ClassVar[tuple[str, ...]] = ()  # keys by which a single-file checkpoint is known
    foreign_keys: ClassVar[tuple[str, ...]] = ()  # keys by which one of a related family is known
    writes_file: ClassVar[bool] = False  # whether `single_file` gives the whole model
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
        dtype: str = "auto",
        prediction: str | None = None,
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
        self.run_dir = Path()
        self.data_resolution = self.resolution
        self.settings: dict[str, Any] = {}  # the resolved config, kept in checkpoints
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
            SettingsError: zero-terminal-SNR with epsilon-prediction: pure noise says nothing about the picture.
        """
        prediction = self.prediction or self.pipeline.scheduler.config.get("prediction_type", "epsilon")
        if self.zero_terminal_snr and prediction == "epsilon":
            raise SettingsError(
                "model.zero_terminal_snr=true does not go with epsilon-prediction: add model.prediction=v_prediction"
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

    def single_file(self) -> dict[str, Tensor]:
        """The whole model under the names of the original code's files; a family that has such says `writes_file`."""
        raise NotImplementedError

    def denoiser_names(self, paths: list[str]) -> dict[str, str]:
        """Paths of the denoiser's layers -> their spelling in a LoRA file."""
        return {path: path for path in paths}

    # Loading

    def configure_model(self) -> None:
        """Load the weights, freeze them, and let the method make trainable what it trains. Once."""
        if self.pipeline is None:
            if self.encodes_ahead and ahead.possible(self):
                self.pipeline = ahead.assemble(self, ahead.encode(self))
            else:
                self.pipeline = self.load_pipeline()
            self.prepare()
            if self.inpaints:
                self.pipeline = inpainting.stock_pipeline(self)

    def build_skeleton(self) -> None:
        """The same without weights, on the meta device: enough to plan."""
        self.pipeline = self.load_skeleton()
        self.prepare()

    def load_pipeline(self, without: Sequence[str] = ()) -> Any:
        """The pipeline with its weights on the CPU; a family that makes its own overrides it.

        Args:
            without: parts that are left out; asked for where `encodes_ahead` alone.
        """
        return loading.load(self, self.checkpoint, dtypes=self.part_dtypes(), without=without)

    def load_skeleton(self) -> Any:
        """The parts of the pipeline on the meta device; a family that makes its own overrides it."""
        return loading.skeleton(self, self.checkpoint)

    def load_part(self, name: str) -> nn.Module:
        """One part anew, with its weights on the CPU."""
        return loading.load_part(self, name, dtype=self.part_dtypes().get(name, self.part_dtypes()["default"]))

    def prepare(self) -> None:
        for name in self.part_names:
            self.part(name).requires_grad_(False).eval()
        self.noise_schedule = self.make_noise()
        self.timesteps = Timesteps.of(self.noise_options)
        loss.refuse(self.loss_options, self.noise_schedule.prediction)
        self.last_snr = noise.last_snr(self.noise_schedule) if self.noise_options.offset_generalized else None
        if self.method is not None:
            self.groups = self.method.attach(self)
            names = [name for name in self.part_names if any(p.requires_grad for p in self.part(name).parameters())]
            self.trained = nn.ModuleDict({name: self.part(name).train() for name in names})
            if self.embeddings is not None:
                self.embeddings.settle(self)
        if self.gradient_checkpointing:
            for part in self.trained.values():
                enable_checkpointing(part)

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """part -> dtype to load it in. The image encoder is kept in fp32: SDXL's overflows in fp16, and its work is
        cached. So is what trains whole."""
        dtype = (self.autocast_dtype or torch.float32) if self.dtype_name == "auto" else DTYPES.get(self.dtype_name)
        if dtype is None:
            raise SettingsError(f"model.dtype={self.dtype_name}: accepted are auto, {', '.join(DTYPES)}")
        whole = self.method.whole_parts if self.method is not None else ()
        exact = [self.image_encoder, *map(self.part_name, whole)]
        return {"default": dtype} | dict.fromkeys(exact, torch.float32)

    def part(self, name: str) -> nn.Module:
        """A network of the pipeline by name; "denoiser" is the one that predicts."""
        return getattr(self.pipeline, self.part_name(name))

    def part_name(self, name: str) -> str:
        """The pipeline's name of a part.

        Raises:
            SettingsError: this family has no such part.
        """
        name = self.denoiser if name == "denoiser" else name
        if name not in self.part_names:
            raise SettingsError(
                f"method.parts.{name}: {type(self).__name__} has no such part; it has denoiser, "
                f"{', '.join(part for part in self.part_names if part != self.denoiser)}"
            )
        return name

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser takes a mask and the masked picture beside the noisy latents."""
        if self.inpaint_pipeline_class is None:
            return False
        return self.part("denoiser").config.in_channels == inpainting.CHANNELS  # type: ignore[union-attr]

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder trains, so that its output cannot be cached."""
        return any(name in self.trained for name in self.text_encoders)

    # What Lightning keeps

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that trains, named as in `state_dict`."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trained weights only."""
        return {name: parameter.detach() for name, parameter in self.trained_parameters().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds other weights than those that train here."""
        own, other = set(self.state_dict()), set(checkpoint["state_dict"])
        if own != other:
            raise SettingsError(
                f"resume: the checkpoint does not fit this run: {len(other - own)} tensors are only in the checkpoint, "
                f"{len(own - other)} only here (such as {sorted(own ^ other)[0]}). Use the same model and method, or "
                "start anew in another hydra.run.dir"
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the place of the live weights, if one is kept."""
        if self.average is None:
            yield
            return
        parameters = self.trained_parameters()
        live = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            assign(parameters, self.average)
            yield
        finally:
            assign(parameters, live)

    # Training

    def on_fit_start(self) -> None:
        """Fill the cache, then let the encoders go or put them out of the way."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        inpainting.check_data(self, data)
        prior.check(self, data.samples)
        self.move_frozen(self.device)
        if not data.cached:
            return
        data.fill_cache(self, images=True, prompts=not self.trains_text, progress=self.track)
        if not self.trains_text:
            self.keep_prompts()
            self.release(self.text_encoders)
        needed = (self.image_encoder,) if self.inpaints and not data.caches_masked else ()
        self.move_frozen(torch.device("cpu"), all_but=(*self.text_encoders, *needed))

    track: Any = None  # set by tasks/train.py: shows the cache's progress

    def keep_prompts(self) -> None:
        """Encode what will be drawn."""
        options = self.sample_options
        texts = [*options.prompts, options.negative_prompt] if options.prompts else []
        self.kept_prompts = drawing.encoded(self, texts, batch_size=options.batch_size)

    def release(self, names: Iterable[str]) -> None:
        """Let go of the weights of frozen parts; `recover` loads them again."""
        for name in names:
            if name not in self.released:
                self.part(name).to("meta")
                self.released.add(name)

    def recover(self, names: Iterable[str] | None = None) -> None:
        """Load again what was let go, all of it or the named parts."""
        for name in [name for name in self.part_names if name in self.released and (names is None or name in names)]:
            setattr(self.pipeline, name, self.load_part(name).requires_grad_(False).eval())
            self.released.discard(name)

    def move_frozen(self, device: torch.device, all_but: tuple[str, ...] = ()) -> None:
        """Move the parts that Lightning does not see."""
        for name in self.part_names:
            if name not in self.trained and name not in all_but and name not in self.released and name != self.denoiser:
                self.part(name).to(device)
        self.part(self.denoiser).to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Notice what has stopped training."""
        stopped = stopping.stopped(self.groups, self.global_step, self.total_steps)
        if len(stopped) != len(self.stopped):
            self.stopped = stopped
            behind = [part for name, part in self.trained.items() if name not in self.text_encoders]
            self.text_stopped = stopping.none_before(behind, self.groups, stopped)

    def on_after_backward(self) -> None:
        stopping.drop_gradients(self.stopped)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """`total` [2] is the sum of the losses and the number of images, of all ranks."""
        losses = self.losses(batch, u=rng.uniforms(batch.key.cpu(), "timestep"), stream="noise")
        total = totalled(losses)
        loss = losses.mean()
        if self.trainer.world_size > 1:  # whose batches may differ in size, and DDP takes the mean over ranks
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
            loss = losses.sum() * self.trainer.world_size / total[1]
        return {"loss": loss, "losses": losses.detach(), "images": len(losses), "total": total}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """All but what the random numbers follow from: the CPU draws them, and must not wait for the device."""
        if device.type == "cpu":
            return batch
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(index=batch.index, key=batch.key)

    gradient_norm: float | None = None  # of this optimizer step, where callbacks/guard.py has measured it

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm that is known, if it is, and only where it is too large; else by Lightning."""
        norm, self.gradient_norm = self.gradient_norm, None
        if norm is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif norm + 1e-6 > gradient_clip_val:  # as torch has it
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, torch.tensor(norm))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The gradients are let go at once: Lightning would keep them through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Done by `optimizer_step`."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same noise every time, at evenly spaced timesteps: only the weights make the loss differ."""
        steps = [
            self.losses(batch, u=torch.full((len(batch.captions),), (k + 0.5) / VALIDATION_TIMESTEPS), stream=f"val{k}")
            for k in range(VALIDATION_TIMESTEPS)
        ]
        self.validated += totalled(torch.stack(steps).mean(0))

    def on_validation_epoch_start(self) -> None:
        self.validated = torch.zeros(2, device=self.device)  # sum of the losses, number of images

    def on_validation_epoch_end(self) -> None:
        """The mean over the images of all ranks, which Lightning's own gets wrong: it rounds their number."""
        losses, images = self.trainer.strategy.reduce(self.validated, reduce_op="sum")
        self.log("val_loss", losses / images, batch_size=1, sync_dist=True)

    def losses(self, batch: Batch, *, u: Tensor, stream: str) -> Tensor:
        """[B] weighted loss of each sample.

        Args:
            u: [B] uniform in 0..1, which become timesteps.
            stream: names the noise, a function of (batch.key, stream).
        """
        latents, cond = self.encode(batch)
        t = self.noise_schedule.sample(self.timesteps(u))  # on the CPU, so that nothing waits for the device
        clean = self.draw_noise(batch, latents, t, stream)
        perturbed = noise.perturbed(clean, batch.key.cpu(), stream, self.noise_options.perturbation)
        noisy = self.noise_schedule.add(latents, perturbed, t)
        inputs = self.denoiser_input(noisy, batch)
        predicted = self.predict(inputs, t.to(self.device, non_blocking=True), cond, batch)
        each = self.objective(predicted, latents, clean, noisy, t, self.position_weights(batch, latents))
        if batch.prior is not None:
            each = prior.preserved(self, each, predicted, inputs, t, batch)
        weight = self.timestep_weight(t)
        each = each if weight is None else each * noise.per_sample(weight, each)
        return each * batch.weight.to(each)

    def position_weights(self, batch: Batch, latents: Tensor) -> Tensor | None:
        """[B, 1, h, w] weights of the latents' positions in the loss; None: all alike."""
        options = self.loss_options
        if not options.masked:
            return None
        assert batch.mask is not None, "the batches of a masked run have masks"
        h, w = latents.shape[-2:]
        return loss.position_weights(
            batch.mask, (h, w), unmasked=options.unmasked_weight, normalize=options.normalize_masked_area
        )

    def denoiser_input(self, noisy: Tensor, batch: Batch) -> Tensor:
        """[B, C, h, w] noisy latents -> what `predict` takes: with mask and masked picture behind them, or as it is."""
        return inpainting.denoiser_input(self, noisy, batch) if self.inpaints else noisy

    def encode(self, batch: Batch) -> tuple[Tensor, Cond]:
        """What the cache gave, or else encoded now."""
        latents = batch.latents
        if latents is None:
            assert batch.pixels is not None
            latents = self.encode_image(batch.pixels)
        if batch.cond is not None:
            return latents, batch.cond
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text_stopped):
            return latents, self.encode_prompt(batch.captions)

    def draw_noise(self, batch: Batch, latents: Tensor, t: Tensor, stream: str) -> Tensor:
        """[B, C, h, w] the noise of (batch.key, stream); drawn by the loader already where it could."""
        keys = batch.key.cpu()
        drawn = batch.noise if stream == "noise" and batch.noise is not None else None
        if drawn is None:
            drawn = rng.normals(keys, tuple(latents.shape[1:]), stream)
        scale = None if self.last_snr is None else noise.offset_scale(self.noise_schedule.snr(t), self.last_snr)
        return noise.shaped(drawn.to(latents), keys, stream, self.noise_options, scale)

    def configure_optimizers(self) -> Any:
        assert self.optimizer is not None and self.lr_schedule is not None
        groups = [
            {"params": group.params, "name": group.name, **({} if group.lr is None else {"lr": group.lr})}
            for group in self.groups
        ]
        optimizer = self.optimizer(groups)
        if self.embeddings is not None:  # here, so that an average is taken afterwards
            optimizer.register_step_post_hook(self.embeddings.after_step)
        stopping.check(self.groups, self.total_steps)
        factors = [stopping.factor(self.lr_schedule, group, self.total_steps) for group in self.groups]
        by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_step, "interval": "step"}}

    # Pictures and files

    def draw(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        negative_prompt: str = "",
        steps: int = 25,
        guidance: float = 7.0,
        size: Size | None = None,
        batch_size: int = 4,
        canvases: list[inpainting.Canvas] | None = None,
    ) -> list[Image]:
        """One picture for each pair of prompt and seed, by the stock pipeline. The same on every call.

        Args:
            canvases: what an inpainting model paints in, one for each pair; None: all of an empty picture.
        """
        return drawing.draw(
            self,
            prompts,
            seeds,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            size=size or Size(self.data_resolution, self.data_resolution),
            batch_size=batch_size,
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

    # What the cache asks

    def image_identity(self) -> str:
        part = self.part(self.image_encoder)
        scaling = [getattr(part.config, name, None) for name in ("scaling_factor", "shift_factor")]
        return fingerprint(part, f"{type(part).__name__} {scaling}")

    def prompt_identity(self) -> str:
        if self.kept_identity is not None:
            return self.kept_identity
        family = f"{type(self).__module__}.{type(self).__qualname__}"  # which layers it reads
        words = [described(value) for name, value in self.pipeline.components.items() if name.startswith("tokenizer")]
        label = hashlib.blake2b(f"{family} {words}".encode(), digest_size=16).hexdigest()
        return " ".join(fingerprint(self.part(name), f"{label} {name}") for name in self.text_encoders)


def totalled(losses: Tensor) -> Tensor:
    """[B] -> [2], their sum and number."""
    return torch.stack([losses.detach().float().sum(), torch.full((), float(len(losses)), device=losses.device)])


def assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def enable_checkpointing(part: Any) -> None:
    """diffusers and transformers, older and newer, name the same switch differently."""
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(part, name) for name in names if hasattr(part, name))()


def fingerprint(part: nn.Module, label: str) -> str:
    """A hash of a network's weights, dtype included."""
    digest = hashlib.blake2b(label.encode(), digest_size=16)
    for name, tensor in part.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def described(tokenizer: Any) -> str:
    """All that a tokenizer's ids depend on, and nothing that the last call left there."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in rules.items() if key not in {"truncation", "padding"}}
    return f"{tokenizer.model_max_length} {json.dumps(rules, sort_keys=True)}"


def steps_per_epoch(batches: int, accumulate: int) -> int:
    """Optimizer steps of one epoch: Lightning takes a step at the epoch's end also for a partial accumulation."""
    return math.ceil(batches / accumulate)
