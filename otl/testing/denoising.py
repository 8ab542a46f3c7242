"""The denoiser: what it predicts, and what is drawn with it."""

from __future__ import annotations

import torch

from otl.testing.comparing import close, differ, require
from otl.testing.inputs import (
    CAPTIONS,
    Factory,
    adapt,
    backward,
    bucket,
    first,
    fits,
    forward,
    inputs,
    loaded,
)


def check_predict_shape(factory: Factory) -> None:
    """The prediction has the latents' shape, twice the channels with a learned variance, and is finite."""
    module = loaded(factory)
    given = inputs(module)
    predicted = forward(module, *given)
    shapes = f"latents {tuple(given[0].shape)} -> prediction {tuple(predicted.shape)}"
    require(fits(module, predicted, given[0]), shapes)
    require(bool(predicted.isfinite().all()), "the prediction is not finite")


def check_predict_depends(factory: Factory) -> None:
    """The prediction depends on the noisy latents, on the timestep and on the caption."""
    module = loaded(factory)
    noisy, t, cond, batch = inputs(module)
    predicted = forward(module, noisy, t, cond, batch)
    require(differ(predicted, forward(module, noisy + 0.5, t, cond, batch)), "predict ignores the noisy latents")
    require(differ(predicted, forward(module, noisy, t.flip(0), cond, batch)), "predict ignores the timestep")
    flipped = {key: value.flip(0) for key, value in cond.items()}
    require(differ(predicted, forward(module, noisy, t, flipped, batch)), "predict ignores the conditioning")


def check_predict_batch(factory: Factory) -> None:
    """The prediction of a sample does not depend on the others of its batch."""
    module = loaded(factory)
    noisy, t, cond, batch = inputs(module)
    both = forward(module, noisy, t, cond, batch)
    others = forward(module, *inputs(module, other=True))
    require(close(both[0], others[0]), "the prediction of the first sample depends on the second")
    alone = (noisy[:1], t[:1], {key: value[:1] for key, value in cond.items()}, first(batch))
    require(close(both[:1], forward(module, *alone)), "a sample alone has another prediction than in a batch")


def check_gradient_checkpointing(factory: Factory) -> None:
    """model.gradient_checkpointing changes the memory, not the loss or the gradients."""
    plain, saving = factory(), factory()
    saving.gradient_checkpointing = True
    found = []
    for module in (plain, saving):
        adapt(module)
        module.train()
        loss = backward(module)
        found.append((loss, {name: p.grad for name, p in module.trained_parameters().items() if p.grad is not None}))
    (loss, gradients), (other, recomputed) = found
    require(close(loss, other), f"the loss is {loss.tolist()}, with gradient_checkpointing {other.tolist()}")
    require(gradients.keys() == recomputed.keys(), "with gradient_checkpointing some weights get no gradient")
    wrong = [name for name in gradients if not close(gradients[name], recomputed[name], 1e-2)]
    require(not wrong, f"gradient_checkpointing changes the gradient of {len(wrong)} weights, such as {wrong[:1]}")


def check_bf16(factory: Factory) -> None:
    """Frozen weights in bf16, adapters in fp32: it trains and draws, also where nothing is autocast."""
    module = factory()
    module.dtype_name = "bf16"
    adapt(module)
    for name in module.part_names:
        expected = torch.float32 if name == module.image_encoder else torch.bfloat16
        wrong = [
            f"{key} is {p.dtype}"
            for key, p in module.part(name).named_parameters()
            if p.dtype != (torch.float32 if p.requires_grad else expected)
        ]
        require(not wrong, f"with dtype=bf16, {len(wrong)} weights of {name} have another dtype: {wrong[:1]}")
    losses = backward(module)
    require(bool(losses.isfinite().all()), f"with dtype=bf16 the losses are {losses.tolist()}")
    module.draw(CAPTIONS[:1], [0], steps=2, guidance=2.0, size=bucket(module))


def check_draw(factory: Factory) -> None:
    """A picture of the size asked for: the same for the same prompt and seed, another for another seed."""
    module = loaded(factory)
    size = bucket(module)
    drawn = [module.draw(CAPTIONS[:1], [seed], steps=2, guidance=2.0, size=size)[0] for seed in (0, 0, 1)]
    require(drawn[0].size == (size.w, size.h), f"asked for {size}, drawn {drawn[0].size[1]}x{drawn[0].size[0]}")
    require(drawn[0].tobytes() == drawn[1].tobytes(), "the same prompt and seed are another picture on the second call")
    require(drawn[0].tobytes() != drawn[2].tobytes(), "two seeds draw one picture")
