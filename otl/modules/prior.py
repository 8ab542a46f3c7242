"""Prior preservation: for some images the target is what the frozen model predicts, so that nothing is forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from otl.methods import forms
from otl.types import Batch, Sample

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule


def check(module: DiffusionModule, samples: list[Sample]) -> None:
    """Refuse samples of `type: prior` where no frozen model is left.

    Raises:
        SettingsError: the method has no adapters that could be switched off.
    """
    priors = sorted({sample.concept for sample in samples if sample.prior})
    if priors:
        forms.require_adapters(priors[0], type(module.method).__name__, there=bool(adapters(module)))


def adapters(module: DiffusionModule) -> list[BaseTunerLayer]:
    """All adapted layers; none where a part trains whole."""
    if module.method is None or module.method.whole_parts:
        return []
    return [layer for part in module.trained.values() for layer in part.modules() if isinstance(layer, BaseTunerLayer)]


@contextlib.contextmanager
def frozen(module: DiffusionModule) -> Iterator[None]:
    """Every adapter switched off, without a gradient, in eval mode."""
    layers, modes = adapters(module), [(each, each.training) for each in module.modules()]
    # Not enable_adapters(False): that also marks the adapters' weights as frozen.
    for layer in layers:
        layer._disable_adapters = True
    for each, _ in modes:
        each.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for each, training in modes:
            each.training = training


def preserved(
    module: DiffusionModule, each: Tensor, predicted: Tensor, inputs: Tensor, t: Tensor, batch: Batch
) -> Tensor:
    """[B] losses -> the same, but where `batch.prior` the distance from what the frozen model predicts.

    Args:
        predicted: what the model that trains gave for `inputs`.
        inputs: what `predict` takes first.
        t: [B] timesteps, on the CPU.
    """
    assert batch.prior is not None
    with frozen(module):
        cond = batch.cond if batch.cond is not None else module.encode_prompt(batch.captions)
        expected = module.predict(inputs, t.to(module.device, non_blocking=True), cond, batch)
    own = module.distance(predicted, expected, t)
    return torch.where(batch.prior.to(each.device), own.to(each), each)
