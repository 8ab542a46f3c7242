"""The contract of a method on a family: every cell of the table that docs/support.md shows.

@pytest.mark.parametrize("check", METHOD_CHECKS)
def test_the_contract(check):
    check(made)  # a new module each time, `module.method` set, nothing loaded
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from otl.modules.base import DiffusionModule
from otl.testing.comparing import close, differ, require
from otl.testing.inputs import CAPTIONS, US, a_batch, encoded, fits, prompted
from otl.types import Batch

Made = Callable[[], DiffusionModule]
"""A new module each time with its method, nothing loaded, on the smallest checkpoint there is."""

STEP = 0.05  # how far the weights are moved from their start, as a share of their size
STEPS = 4  # optimizer steps of the overfit
LR = 1e-4  # so small that the loss of any network falls


def started(made: Made) -> DiffusionModule:
    """Loaded, the method attached, everything as it is before the first step."""
    module = made()
    module.configure_model()
    return module


def moved(made: Made, *, seed: int = 0) -> DiffusionModule:
    """The same some way from its start, where adapters are no longer nothing."""
    module = started(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            size = parameter.abs().mean() if parameter.any() else 1.0
            parameter.add_(STEP * size * torch.randn(parameter.shape, generator=generator))
    return module


def batch_of(module: DiffusionModule) -> Batch:
    """Two pictures; their captions hold every placeholder."""
    words = " ".join(spec.placeholder for spec in module.embeddings.specs.values()) if module.embeddings else ""
    return a_batch(module)._replace(captions=[f"{caption} {words}".strip() for caption in CAPTIONS])


def losses_of(module: DiffusionModule, batch: Batch) -> Tensor:
    """[2] the losses of a batch at fixed noise and timesteps."""
    return module.losses(batch, u=US, stream="noise")


def predicted(module: DiffusionModule) -> Tensor:
    """The denoiser's prediction for fixed inputs."""
    module.eval()
    batch = batch_of(module)
    with torch.no_grad():
        assert batch.pixels is not None
        latents = module.encode_image(batch.pixels)
        t = module.noise_schedule.sample(US)
        return module.predict(module.denoiser_input(latents, batch), t, module.encode_prompt(batch.captions), batch)


def unreached(module: DiffusionModule) -> dict[str, nn.Parameter]:
    """What trains and gets no gradient from a batch, by name; afterwards the gradients are there."""
    module.train()
    losses_of(module, batch_of(module)).mean().backward()
    trained = module.trained_parameters()
    return {name: each for name, each in trained.items() if each.grad is None or not each.grad.any()}


def read(module: DiffusionModule, weights: dict[str, nn.Parameter]) -> list[str]:
    """The names of those that the losses of a batch depend on."""
    if not matters(module, list(weights.values())):
        return []
    return [name for name, each in weights.items() if matters(module, [each])]


@torch.no_grad()
def matters(module: DiffusionModule, weights: list[nn.Parameter]) -> bool:
    """Whether the losses of a batch are others with other numbers in all of `weights`, which get theirs back."""
    module.eval()  # without dropout
    batch, kept, generator = batch_of(module), [each.clone() for each in weights], torch.Generator().manual_seed(0)
    before = losses_of(module, batch)
    for each in weights:
        each.copy_(torch.randn(each.shape, generator=generator))
    after = losses_of(module, batch)
    for each, numbers in zip(weights, kept):
        each.copy_(numbers)
    return not torch.equal(before, after)


def check_the_shape_is_kept(made: Made) -> None:
    """The prediction has the latents' shape, twice their channels with a learned variance, and is finite."""
    module = started(made)
    batch, found = batch_of(module), predicted(module)
    assert batch.pixels is not None
    latents = encoded(module, batch.pixels)
    require(fits(module, found, latents), f"latents {tuple(latents.shape)} -> prediction {tuple(found.shape)}")
    require(bool(found.isfinite().all()), "the prediction is not finite")


def check_gradients_reach_what_trains(made: Made) -> None:
    """Each weight in a group gets a gradient, and nothing else does.

    Excused is what no loss depends on, whatever numbers are in it: the layers of a text encoder behind the one that is
    read, and what meets zeros alone, such as an input that training leaves empty. Adapters are moved from their start,
    where one factor is zero and the other gets no gradient.
    """
    module = moved(made)
    silent = unreached(module)
    own = {id(parameter) for group in module.groups for parameter in group.params}
    trained = {id(parameter) for parameter in module.trained_parameters().values()}
    require(bool(module.groups), "the method gives no groups")
    require(own == trained, "the groups are not what trains")
    ids = {id(parameter) for parameter in silent.values()}
    for group in module.groups:
        require(not {id(each) for each in group.params} <= ids, f"no gradient reaches {group.name}")
    for name in module.part_names:
        extra = [
            key
            for key, parameter in module.part(name).named_parameters()
            if id(parameter) not in own and (parameter.requires_grad or parameter.grad is not None)
        ]
        require(not extra, f"{len(extra)} weights of {name} get a gradient and are in no group, such as {extra[:1]}")
    missed = read(module, silent)
    require(not missed, f"no gradient reaches {len(missed)} weights that the loss depends on, such as {missed[:1]}")


def check_one_batch_is_learned(made: Made) -> None:
    """The loss of one batch at fixed noise falls; what does not train stays bit for bit as it was."""
    module = started(made)
    module.eval()  # without dropout
    batch = batch_of(module)
    assert batch.pixels is not None
    batch = batch._replace(latents=encoded(module, batch.pixels))
    frozen = {
        f"{name}.{key}": parameter.detach().clone()
        for name in module.part_names
        for key, parameter in module.part(name).named_parameters()
        if not parameter.requires_grad
    }
    groups = [{"params": group.params} for group in module.groups]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    if module.embeddings is not None:
        optimizer.register_step_post_hook(module.embeddings.after_step)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = losses_of(module, batch).mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    require(found[-1] < found[0], f"the loss of one batch went from {found[0]} to {found[-1]} in {STEPS} steps")
    after = {
        f"{name}.{key}": parameter
        for name in module.part_names
        for key, parameter in module.part(name).named_parameters()
    }
    changed = [key for key, value in frozen.items() if not torch.equal(after[key], value)]
    require(not changed, f"{len(changed)} frozen weights changed, such as {changed[:1]}")


def check_the_cache_changes_no_loss(made: Made) -> None:
    """The loss from cached latents, and cached conditioning where none trains, is that from pixels and captions."""
    module = moved(made)
    module.eval()
    batch = batch_of(module)
    with torch.no_grad():
        plain = losses_of(module, batch)
        assert batch.pixels is not None
        latents = module.encode_image(batch.pixels)
        cond = None if module.trains_text else prompted(module, batch.captions)
        cached = losses_of(module, batch._replace(latents=latents, cond=cond))
    require(close(plain, cached), f"losses are {plain.tolist()}, with what the cache keeps {cached.tolist()}")


def check_weights_come_back(made: Made) -> None:
    """What a checkpoint holds is enough for the same prediction."""
    module, other = moved(made), started(made)
    before, after = predicted(other), predicted(module)
    require(differ(before, after), "what trains does not change the prediction")
    other.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, strict=False)
    require(torch.equal(predicted(other), after), "after loading the weights the prediction is another")


METHOD_CHECKS = (
    check_the_shape_is_kept,
    check_gradients_reach_what_trains,
    check_one_batch_is_learned,
    check_the_cache_changes_no_loss,
    check_weights_come_back,
)


def check_method(made: Made) -> None:
    """Every check of METHOD_CHECKS."""
    for check in METHOD_CHECKS:
        check(made)
