from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.trainer.call import _call_callback_hooks

from otl.callbacks.hooks import EVERY_BATCH, Unprofiled, drop_empty
from otl.tasks.train import build_trainer

LINE = ["data.path=x", "logger=none", "trainer.accelerator=cpu"]


class Counting(Callback):
    def __init__(self):
        self.calls = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.calls.append("on_before_zero_grad")


class Inheriting(Counting):
    pass


def test_hooks_that_a_callback_has_stay_and_empty_ones_go():
    callbacks = [Counting(), Inheriting(), Callback()]
    drop_empty(callbacks)
    left = [[name for name in EVERY_BATCH if getattr(each, name) is not None] for each in callbacks]
    assert left == [["on_before_zero_grad"], ["on_before_zero_grad"], []]
    assert callable(callbacks[0].on_train_start)


def test_lightning_calls_what_is_left(settings):
    trainer = build_trainer(settings(*LINE), "32-true")
    callback = Counting()
    trainer.callbacks = [callback, *trainer.callbacks]
    drop_empty(trainer.callbacks)
    _call_callback_hooks(trainer, "on_before_zero_grad", None)
    assert callback.calls == ["on_before_zero_grad"]


def test_every_hook_that_is_dropped_is_lightnings_own_of_a_batch():
    assert all(callable(getattr(Callback, name)) for name in EVERY_BATCH)


def test_a_run_does_without_a_profiler_unless_asked_for_one(settings):
    trainer = build_trainer(settings(*LINE), "32-true")
    assert isinstance(trainer.profiler, Unprofiled)
    assert all(callback.on_before_zero_grad is None for callback in trainer.callbacks)
    trainer = build_trainer(settings(*LINE, "trainer.profiler=simple"), "32-true")
    assert isinstance(trainer.profiler, SimpleProfiler)
