"""Every image of an optimizer step counts alike, in whatever batch it came."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from otl import schedules
from otl.methods.lora import Lora
from otl.modules.stable_diffusion import StableDiffusion
from otl.testing import a_batch
from otl.types import Batch


class Uncached(StableDiffusion):
    """Trained on batches that need no dataset."""

    def on_fit_start(self):
        pass


class Gradients(Callback):
    """Of every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))


def images(module, *numbers: int) -> Batch:
    """A batch of some of three pictures, the last with a weight of its own."""
    pairs = a_batch(module), a_batch(module, other=True)
    rows = [(pairs[0], 0), (pairs[0], 1), (pairs[1], 1)]
    made = []
    for field in Batch._fields:
        values = [getattr(batch, field) for batch, _ in rows]
        rows_of = [None if value is None else value[row] for value, (_, row) in zip(values, rows)]
        chosen = [rows_of[number] for number in numbers]
        made.append(chosen if field == "captions" else None if chosen[0] is None else torch.stack(chosen))
    weights = torch.tensor([1.0, 1.0, 3.0])[list(numbers)]
    return Batch(*made)._replace(weight=weights)


def gradients(folder, *batches: tuple[int, ...], accumulate: int) -> list[torch.Tensor]:
    """Of each optimizer step of one epoch; the learning rate is 0, so that all are at the same weights."""
    torch.manual_seed(3)
    module = Uncached(str(folder))
    module.method = Lora(rank=2)
    module.optimizer, module.lr_schedule = lambda groups: torch.optim.SGD(groups, lr=0.0), schedules.constant
    module.total_steps = 10
    seen = Gradients()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
    )
    module.configure_model()
    loader = torch.utils.data.DataLoader([images(module, *each) for each in batches], batch_size=None)
    trainer.fit(module, loader)
    return seen.seen


@pytest.mark.parametrize("batches", [[(0, 1), (2,)], [(0,), (1, 2)], [(0,), (1,), (2,)], [(0, 1, 2)]])
def test_accumulated_batches_of_any_sizes_are_one_batch(sd15_folder, batches):
    """The last case, one batch where four are accumulated, is the end of an epoch."""
    (together,) = gradients(sd15_folder, (0, 1, 2), accumulate=1)
    (apart,) = gradients(sd15_folder, *batches, accumulate=4)
    assert together.abs().max() > 0
    assert torch.allclose(apart, together, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


def test_each_optimizer_step_begins_anew(sd15_folder):
    first, second, last = gradients(sd15_folder, (0, 1), (2,), (0,), (1, 2), (2,), accumulate=2)
    (alone,) = gradients(sd15_folder, (2,), accumulate=1)
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-5 * float(first.abs().max()))
    assert torch.allclose(last, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
