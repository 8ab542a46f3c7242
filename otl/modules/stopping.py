"""Groups of parameters that stop training before the run ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import nn

from otl.epochs import epochs_of
from otl.schedules import warmup_steps
from otl.types import ParamGroup, Problem


class Length(NamedTuple):
    """Of a run, in optimizer steps."""

    steps: int
    per_epoch: int


def last_step(group: ParamGroup, run: Length) -> int | None:
    """How many optimizer steps a group takes part in; None: all."""
    if group.stop_after is None:
        return None
    if isinstance(group.stop_after, str):
        epochs = epochs_of(group.stop_after)
        assert epochs is not None, "read when the settings were"
        return epochs * run.per_epoch
    return max(1, warmup_steps(group.stop_after, run.steps))


def stopped(groups: list[ParamGroup], step: int, run: Length) -> list[ParamGroup]:
    """The groups that take no part in the optimizer step after `step` of them."""
    return [group for group in groups if (last := last_step(group, run)) is not None and step >= last]


def factor(schedule: Callable[[int, int], float], group: ParamGroup, run: Length) -> Callable[[int], float]:
    """Optimizer step -> factor of the learning rate of one group: the run's schedule, and 0 once it has stopped."""
    return lambda step: 0.0 if stopped([group], step, run) else schedule(step, run.steps)


def problems(groups: list[ParamGroup], run: Length) -> Iterator[Problem]:
    """A run whose end trains nothing, which is fatal, and groups that stop too late to stop."""
    ends = {group.name: last for group in groups if (last := last_step(group, run)) is not None}
    if groups and len(ends) == len(groups) and max(ends.values()) < run.steps:
        message = (
            f"all that trains has stopped after step {max(ends.values())} of {run.steps}: leave one part without "
            f"stop_after, or set trainer.max_steps={max(ends.values())}"
        )
        yield Problem("stop_after", message)
    for name, last in ends.items():
        if last >= run.steps:
            message = f"{last} steps, which has no effect: the run has {run.steps}"
            yield Problem(f"stop_after of {name}", message, fatal=False)


def drop_gradients(groups: list[ParamGroup]) -> None:
    """Optimizers pass over parameters without a gradient: no update, no decay, no momentum."""
    for group in groups:
        for parameter in group.params:
            parameter.grad = None


def none_before(behind: Iterable[nn.Module], groups: list[ParamGroup], gone: list[ParamGroup]) -> bool:
    """Whether all that still trains lies in the networks `behind` the conditioning."""
    inside = {id(parameter) for network in behind for parameter in network.parameters()}
    names = {group.name for group in gone}
    return all(id(parameter) in inside for group in groups if group.name not in names for parameter in group.params)
