"""How a family trains: what Lightning calls, and the loss of a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from otl import loss, noise, rng
from otl.config import SettingsError
from otl.modules import inpainting, prior, stopping
from otl.modules.skipping import skippable
from otl.moving import per_sample, to_like
from otl.types import Batch, Cond

VALIDATION_TIMESTEPS = 4  # forward passes for each held-out image, at evenly spaced timesteps


class Training(LightningModule):
    """What a `DiffusionModule` does in a run; its attributes are declared there."""

    # What Lightning keeps

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that trains, named as in `state_dict`."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trained weights only."""
        return {name: parameter.detach() for name, parameter in self.trained_parameters().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With what tells whether a run that goes on from it is still the same (tasks/resuming.py)."""
        checkpoint |= {
            "settings": self.settings,
            "precision": self.precision_name,
            "dataset": self.dataset,
            "total_steps": self.total_steps,
        }

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

    def on_train_start(self) -> None:
        """A checkpoint has put back the optimizer's settings of its time: those of now hold."""
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        schedule.base_lrs = [settings["lr"] for settings in self.stated]
        for group, settings, factor in zip(optimizer.param_groups, self.stated, schedule.lr_lambdas):
            group.update(settings | {"initial_lr": settings["lr"], "lr": settings["lr"] * factor(schedule.last_epoch)})

    stated: list[dict[str, Any]] = []  # what the settings say of each group of the optimizer
    track: Any = None  # set by tasks/train.py: shows the cache's progress

    @property
    def length(self) -> stopping.Length:
        """Of the whole run."""
        return stopping.Length(self.total_steps, self.steps_per_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Notice what has stopped training."""
        stopped = stopping.stopped(self.groups, self.global_step, self.length)
        if len(stopped) != len(self.stopped):
            self.stopped = stopped
            behind = [part for name, part in self.trained.items() if name not in self.text_encoders]
            self.text_stopped = stopping.none_before(behind, self.groups, stopped)

    def on_after_backward(self) -> None:
        stopping.drop_gradients(self.stopped)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """`total` [2] is the sum of the losses and the number of images, of all ranks."""
        losses = self.batch_losses(batch)
        total, images = totalled(losses), len(losses)
        loss = losses.mean()
        if self.trainer.world_size > 1:  # whose batches may differ in size, and DDP takes the mean over ranks
            counts = self.counts(batch_idx)
            total = self.trainer.strategy.reduce(total * counts, reduce_op="sum")
            loss, images = counts * losses.sum() * self.trainer.world_size / total[1], total[1]
        if self.trainer.accumulate_grad_batches > 1:
            loss = self.shared(loss, images)
        return {"loss": loss, "losses": losses.detach(), "images": len(losses), "total": total}

    def counts(self, batch_idx: int) -> bool:
        """Whether a batch is one of the epoch, or of the validation, and not only there to make ranks even."""
        return not self.trainer.datamodule.fills(batch_idx)  # type: ignore[attr-defined]

    def batch_losses(self, batch: Batch) -> Tensor:
        """[B] weighted loss of each sample, with the noise and the timesteps of its key."""
        return self.losses(batch, u=rng.uniforms(batch.key.cpu(), "timestep"), stream="noise")

    def batch_timesteps(self, batch: Batch) -> Tensor:
        """[B] the timesteps that `batch_losses` takes."""
        return self.noise_schedule.sample(self.timesteps(rng.uniforms(batch.key.cpu(), "timestep")))

    accumulated: Tensor | int = 0  # images whose gradients wait for the optimizer step

    def shared(self, loss: Tensor, images: Tensor | int) -> Tensor:
        """Make every image of an optimizer step count alike: the gradients are the mean over its images at any time.

        Lightning takes the mean over batches, which may differ in size, and counts those that an epoch's end lacks.

        Args:
            loss: mean over the images of a batch.
            images: how many they are, of all ranks.

        Returns:
            What Lightning is to divide by the number of batches.
        """
        before, self.accumulated = self.accumulated, self.accumulated + images
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, before / self.accumulated)
        return loss * (self.trainer.accumulate_grad_batches * images / self.accumulated)

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
        with skippable(self.trainer.scaler):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        self.accumulated = 0

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Done by `optimizer_step`."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same noise every time: only the weights make the loss differ."""
        losses = self.spaced_losses(batch, VALIDATION_TIMESTEPS).mean(1)
        self.validated += totalled(losses) * self.counts(batch_idx)

    def spaced_losses(self, batch: Batch, count: int) -> Tensor:
        """[B, count] losses at evenly spaced timesteps, each with noise of its own that only `batch.key` decides."""
        steps = [
            self.losses(batch, u=u.expand(len(batch.captions)), stream=f"val{k}") for k, u in enumerate(spaced(count))
        ]
        return torch.stack(steps, dim=1)

    ranked_timesteps = VALIDATION_TIMESTEPS  # of `predict_step`; set by tasks/rank.py

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """[B] sample numbers and [B, ranked_timesteps] losses, with the same noise for all samples."""
        same = torch.full_like(batch.key, rng.key(self.seed, "rank"))
        return batch.index.cpu(), self.spaced_losses(batch._replace(key=same), self.ranked_timesteps).float().cpu()

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
        each = each if weight is None else each * per_sample(weight, each)
        return each * batch.weight.to(each)

    def position_weights(self, batch: Batch, latents: Tensor) -> Tensor | None:
        """[B, 1, h, w] weights of the latents' positions in the loss; None: all alike."""
        options = self.loss_options
        if not options.masked:
            return None
        assert batch.mask is not None, "the batches of a masked run have masks"
        h, w = latents.shape[-2:]
        weights = loss.position_weights(
            batch.mask, (h, w), unmasked=options.unmasked_weight, normalize=options.normalize_masked_area
        )
        if options.unmasked_probability == 0 or not self.training:  # validation always looks where the mask does
            return weights
        whole = rng.uniforms(batch.key.cpu(), "unmasked") < options.unmasked_probability
        return torch.where(per_sample(whole, weights) > 0, 1.0, weights)

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
        return noise.shaped(to_like(drawn, latents), keys, stream, self.noise_options, scale)

    def configure_optimizers(self) -> Any:
        assert self.optimizer is not None and self.lr_schedule is not None
        groups = [
            {"params": group.params, "name": group.name, **({} if group.lr is None else {"lr": group.lr})}
            for group in self.groups
        ]
        optimizer = self.optimizer(groups)
        names = {"lr", *self.settings.get("optimizer", {})}
        self.stated = [{name: group[name] for name in names & group.keys()} for group in optimizer.param_groups]
        if self.embeddings is not None:  # here, so that an average is taken afterwards
            optimizer.register_step_post_hook(self.embeddings.after_step)
        factors = [stopping.factor(self.lr_schedule, group, self.length) for group in self.groups]
        by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_step, "interval": "step"}}


def spaced(count: int) -> Tensor:
    """[count] numbers in 0..1, evenly spaced and as far from the ends as half of what lies between them."""
    return (torch.arange(count) + 0.5) / count


def totalled(losses: Tensor) -> Tensor:
    """[B] -> [2], their sum and number."""
    return torch.stack([losses.detach().float().sum(), torch.full((), float(len(losses)), device=losses.device)])


def assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def steps_per_epoch(batches: int, accumulate: int) -> int:
    """Optimizer steps of one epoch: Lightning takes a step at the epoch's end also for a partial accumulation."""
    return math.ceil(batches / accumulate)
