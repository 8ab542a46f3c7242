"""The smallest module that has what the callbacks ask of a DiffusionModule, and a loader that knows where it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn

from otl.config import Output, SampleOptions
from otl.modules.skipping import skippable
from otl.types import Batch, Size

IMAGES = 10
BATCH_SIZE = 4  # the third batch of an epoch has two images


class TinyLoader:
    """10 images in batches of 4, 4 and 2; the order is a function of the epoch; its state is {epoch, delivered}."""

    def __init__(self) -> None:
        self.epoch = self.delivered = 0

    def __len__(self) -> int:
        return -(-IMAGES // BATCH_SIZE)

    def __iter__(self) -> Iterator[Batch]:
        if self.delivered == len(self):
            self.epoch, self.delivered = self.epoch + 1, 0
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(self.epoch)).split(BATCH_SIZE)
        while self.delivered < len(self):
            self.delivered += 1
            yield batch_of(order[self.delivered - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "delivered": self.delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.delivered = state["epoch"], state["delivered"]


class HeldOut:
    """Two batches."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Batch]:
        yield batch_of(torch.arange(3))
        yield batch_of(torch.arange(3, 5))


def batch_of(index: Tensor) -> Batch:
    """The images of these numbers: each its own constant pattern."""
    sides = torch.full((len(index), 2), 8)
    pixels = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(100 + int(i))) for i in index])
    return Batch(index, index, [""] * len(index), sides, sides, sides, torch.ones(len(index)), pixels=pixels)


class TinyData(LightningDataModule):
    """The two loaders, and the names of the images."""

    def __init__(self, loader: TinyLoader) -> None:
        super().__init__()
        self.loader = loader
        self.samples = [SimpleNamespace(name=f"{number}.png") for number in range(IMAGES)]

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return HeldOut()


class TinyModule(LightningModule):
    """A linear layer that learns to give back its input, with dropout: it needs torch's global generator."""

    inpaints = False
    part_names = ("net",)
    guidance = 6.0

    def __init__(self, run_dir: Path, total_steps: int, *, lr: float = 0.05, poisoned: int | None = None) -> None:
        super().__init__()
        self.run_dir, self.total_steps, self.lr = run_dir, total_steps, lr
        self.steps_per_epoch = 3  # without accumulation
        self.poisoned = poisoned  # number of an image that makes the loss NaN
        self.data_resolution = 8
        self.sample_options = SampleOptions()
        self.output_options = Output()
        self.average: dict[str, Tensor] | None = None
        torch.manual_seed(7)
        self.net = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.losses: list[tuple[int, float]] = []  # of each batch: optimizer steps before it, loss
        self.draws: list[tuple[int, bool, bool]] = []  # of each call: step, eval mode, by the average

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        live = {name: weight.detach().clone() for name, weight in self.trained_parameters().items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(live)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.trained_parameters().items():
            weight.copy_(values[name])

    def part(self, name: str) -> nn.Module:
        return self.net

    def autocast(self) -> Any:
        return nullcontext()

    def batch_timesteps(self, batch: Batch) -> Tensor:
        return 100 * batch.key

    def batch_losses(self, batch: Batch) -> Tensor:
        losses = (self.net(self.dropout(batch.pixels)) - batch.pixels).square().mean(1)
        return torch.where(
            batch.index == -1 if self.poisoned is None else batch.index == self.poisoned, torch.nan, losses
        )

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        with skippable(self.trainer.scaler):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        losses = self.batch_losses(batch)
        self.losses.append((self.trainer.global_step, losses.mean().item()))
        total = torch.tensor([losses.sum().item(), len(losses)])
        return {"loss": losses.mean(), "losses": losses.detach(), "images": len(losses), "total": total}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = (self.net(batch.pixels) - batch.pixels).square().mean()
        self.log("val_loss", loss, on_epoch=True, batch_size=len(batch.index))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([{"params": list(self.net.parameters()), "name": "unet"}], lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def draw(self, prompts: list[str], seeds: list[int], *, size: Size, **options: Any) -> list[Image.Image]:
        torch.rand(3)  # a pipeline that is careless with the global generator
        by_average = self.average is not None and torch.equal(self.average["net.weight"], self.net.weight)
        self.draws.append((self.trainer.global_step, not self.dropout.training, by_average))
        red = int(self.net.weight.detach().abs().sum() * 20) % 256
        return [
            Image.new("RGB", (size.w, size.h), (red, seed % 256, len(prompt))) for prompt, seed in zip(prompts, seeds)
        ]

    def export(self, path: Path) -> Path:
        torch.rand(3)  # a library that is as careless
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.with_name(path.name + ".json")
        path.write_text(json.dumps(self.net.weight.tolist()))
        return path


class Weights(Callback):
    """Keeps the weights at the start and after each optimizer step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: TinyModule) -> None:
        self.seen.append(pl_module.net.weight.detach().clone())

    def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
        if trainer.global_step == len(self.seen):
            self.seen.append(pl_module.net.weight.detach().clone())


Run = Callable[..., TinyModule]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Train a TinyModule for some steps with some callbacks."""

    def fit(
        *callbacks: Callback,
        steps: int,
        total: int | None = None,
        folder: str = "run",
        ckpt: Path | None = None,
        accumulate: int = 1,
        change: Callable[[TinyModule], Any] = lambda module: None,
        validate: bool = False,
        validate_every: int | None = None,  # batches; None: an epoch
        loader: TinyLoader | None = None,
        logger: Any = False,
        plugins: Any = None,
        log_every: int = 1,
        **options: Any,
    ) -> TinyModule:
        module = TinyModule(tmp_path / folder, total or steps, **options)
        change(module)
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=logger,
            plugins=plugins,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            accumulate_grad_batches=accumulate,
            default_root_dir=tmp_path,
            log_every_n_steps=log_every,
            limit_val_batches=1.0 if validate else 0,
            val_check_interval=validate_every,
            check_val_every_n_epoch=1 if validate_every is None else None,
        )
        trainer.fit(module, datamodule=TinyData(loader or TinyLoader()), ckpt_path=ckpt, weights_only=True)
        return module

    return fit


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)
