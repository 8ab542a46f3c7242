"""What Lightning does around each hook, without what nobody asked for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler

EVERY_BATCH = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def drop_empty(callbacks: Iterable[Callback]) -> None:
    """Of what is called in every batch, the hooks that a callback does not have: Lightning passes over what is None.

    It would call each of its own empty ones, by a name that it puts together for its profiler, which adds up
    (docs/performance.md).
    """
    for callback in callbacks:
        for name in EVERY_BATCH:
            if getattr(type(callback), name) is getattr(Callback, name):
                setattr(callback, name, None)


class Unprofiled(PassThroughProfiler):
    """Measures nothing, as Lightning's own, which makes a generator for each of the many calls of a step."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self.nothing
