"""Parts that stop early: from then on not one bit of them changes, whatever the optimizer."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from otl import schedules
from otl.config import conf_dir
from otl.methods.finetune import Finetune
from otl.methods.lora import Lora
from otl.modules import stopping
from otl.modules.stable_diffusion import StableDiffusion
from otl.tasks.run import deferred
from otl.testing import a_batch
from otl.types import ParamGroup

OPTIMIZERS = sorted(path.stem for path in (conf_dir() / "optimizer").glob("*.yaml"))
STEPS, STOP = 6, 3
PER_EPOCH = 2
HUNDRED = stopping.Length(100, 7)


class Uncached(StableDiffusion):
    """Trained on batches that need no dataset."""

    def on_fit_start(self):
        pass


class Weights(Callback):
    """Both parts' weights and the text encoder's gradients after every optimizer step."""

    def __init__(self):
        self.seen = []
        self.reached = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.reached.append(any(p.grad is not None for p in pl_module.trained["text_encoder"].parameters()))

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step > len(self.seen):
            self.seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def run(folder, method, optimizer, *, steps=STEPS, accumulate=1, weight_decay=None, ckpt=None, total=STEPS, **trainer):
    module = Uncached(str(folder))
    module.method = method
    options = OmegaConf.load(conf_dir() / "optimizer" / f"{optimizer}.yaml")
    options.lr = 1.0 if optimizer == "prodigy" else 1e-2
    options.weight_decay = 0.1
    module.optimizer, module.lr_schedule = deferred(options), schedules.constant
    module.total_steps, module.steps_per_epoch = total, PER_EPOCH
    weights = Weights()
    fit = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[weights],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        **trainer,
    )
    module.configure_model()
    batches = torch.utils.data.DataLoader([a_batch(module)] * steps * accumulate, batch_size=None)
    fit.fit(module, batches, ckpt_path=ckpt, weights_only=False)
    return module, weights, fit


def changed(weights, part):
    """Of each optimizer step but the first: whether any weight of a part is another."""
    return [
        any(not torch.equal(a[name], b[name]) for name in a if f".{part}." in f".{name}")
        for a, b in zip(weights.seen, weights.seen[1:])
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [STOP, STOP / STEPS])
def test_nothing_of_a_stopped_part_changes_whatever_the_optimizer(sd15_folder, optimizer, stop):
    method = Lora(rank=2, parts={"denoiser": {}, "text_encoder": {"stop_after": stop}})
    _, weights, _ = run(sd15_folder, method, optimizer)
    assert len(weights.seen) == STEPS
    assert changed(weights, "text_encoder") == [True] * (STOP - 1) + [False] * (STEPS - STOP)
    assert changed(weights, "unet") == [True] * (STEPS - 1)
    assert weights.reached == [True] * STOP + [False] * (STEPS - STOP)


def test_a_whole_part_stops_too_and_steps_are_optimizer_steps(sd15_folder):
    method = Finetune(parts={"denoiser": {}, "text_encoder": {"stop_after": 2}})
    _, weights, _ = run(sd15_folder, method, "adamw", steps=4, accumulate=2, total=4)
    assert changed(weights, "text_encoder") == [True, False, False]
    assert changed(weights, "unet") == [True] * 3


def test_the_denoiser_may_stop_before_the_text_encoder(sd15_folder):
    method = Lora(rank=2, parts={"denoiser": {"stop_after": 2}, "text_encoder": {}})
    _, weights, _ = run(sd15_folder, method, "adamw", steps=4, total=4)
    assert changed(weights, "unet") == [True, False, False]
    assert changed(weights, "text_encoder") == [True] * 3


def test_a_resumed_run_stops_where_the_unbroken_one_does(sd15_folder, tmp_path):
    def method():
        return Lora(rank=2, parts={"denoiser": {}, "text_encoder": {"stop_after": STOP}})

    whole, _, _ = run(sd15_folder, method(), "adamw")
    for broken in (2, 4):
        _, _, fit = run(sd15_folder, method(), "adamw", steps=broken)
        fit.save_checkpoint(tmp_path / "last.ckpt")
        again, _, _ = run(sd15_folder, method(), "adamw", ckpt=tmp_path / "last.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), (broken, name)


def group(name, stop):
    return ParamGroup(name, [], None, stop)


def test_the_learning_rate_of_a_stopped_group_is_zero():
    factor = stopping.factor(schedules.linear, group("a", 0.25), stopping.Length(8, 2))
    assert [factor(step) for step in range(4)] == [1.0, 1 - 1 / 8, 0.0, 0.0]
    endless = stopping.factor(schedules.linear, group("a", None), stopping.Length(8, 2))
    assert [endless(step) for step in range(9)] == [1 - step / 8 for step in range(9)]


def test_a_share_too_small_for_a_step_is_one_step():
    assert stopping.last_step(group("a", 0.001), HUNDRED) == 1
    assert stopping.last_step(group("a", 7), HUNDRED) == 7
    assert stopping.last_step(group("a", 0.5), HUNDRED) == 50


def test_epochs_are_counted_in_the_steps_of_one():
    assert stopping.last_step(group("a", "1 epoch"), HUNDRED) == 7
    assert stopping.last_step(group("a", "12 epochs"), HUNDRED) == 84


def test_a_part_trains_for_whole_epochs(sd15_folder):
    method = Lora(rank=2, parts={"denoiser": {}, "text_encoder": {"stop_after": "2 epochs"}})
    _, weights, _ = run(sd15_folder, method, "adamw")
    assert changed(weights, "text_encoder") == [True] * 3 + [False] * 2


def problems(*groups):
    return {problem.key: (problem.message, problem.fatal) for problem in stopping.problems(list(groups), HUNDRED)}


def test_a_run_whose_end_trains_nothing_is_refused():
    message, fatal = problems(group("a", 0.5), group("b", "3 epochs"))["stop_after"]
    assert "stopped after step 50 of 100: " in message and "or set trainer.max_steps=50" in message
    assert fatal
    assert problems(group("a", 0.5), group("b", None)) == {}
    assert list(problems(group("a", 100), group("b", 0.5))) == ["stop_after of a"]


@pytest.mark.parametrize(("stop", "steps"), [(200, 200), ("15 epochs", 105)])
def test_a_stop_after_the_end_is_told(stop, steps):
    found = problems(group("unet", None), group("text_encoder", stop))
    assert found == {"stop_after of text_encoder": (f"{steps} steps, which has no effect: the run has 100", False)}
