"""Groups of parameters that stop training before the run ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from torch import nn

from otl.config import SettingsError
from otl.schedules import warmup_steps
from otl.types import ParamGroup

log = logging.getLogger(__name__)


def last_step(group: ParamGroup, total_steps: int) -> int | None:
    """How many optimizer steps a group takes part in; None: all."""
    return None if group.stop_after is None else max(1, warmup_steps(group.stop_after, total_steps))


def stopped(groups: list[ParamGroup], step: int, total_steps: int) -> list[ParamGroup]:
    """The groups that take no part in the optimizer step after `step` of them."""
    return [group for group in groups if (last := last_step(group, total_steps)) is not None and step >= last]


def factor(schedule: Callable[[int, int], float], group: ParamGroup, total_steps: int) -> Callable[[int], float]:
    """Optimizer step -> factor of the learning rate of one group: the run's schedule, and 0 once it has stopped."""
    return lambda step: 0.0 if stopped([group], step, total_steps) else schedule(step, total_steps)


def check(groups: list[ParamGroup], total_steps: int) -> None:
    """Refuse a run whose end trains nothing, and tell of groups that stop too late to stop.

    Raises:
        SettingsError: every group has stopped before the last step.
    """
    ends = {group.name: last for group in groups if (last := last_step(group, total_steps)) is not None}
    if groups and len(ends) == len(groups) and max(ends.values()) < total_steps:
        raise SettingsError(
            f"stop_after: all that trains has stopped after step {max(ends.values())} of {total_steps}: leave one part "
            f"without stop_after, or set trainer.max_steps={max(ends.values())}"
        )
    for name, last in ends.items():
        if last >= total_steps:
            log.warning(f"stop_after of {name}, {last} steps, has no effect: the run has {total_steps}")


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
