"""The skeleton, from which `task=plan` counts and measures."""

from __future__ import annotations

import torch

from otl.testing.comparing import require
from otl.testing.inputs import CAPTIONS, Factory, a_batch, fits, loaded, on_meta


def check_skeleton_shapes(factory: Factory) -> None:
    """The skeleton has the loaded parts' parameters, on the meta device."""
    module, skeleton = loaded(factory), factory()
    skeleton.build_skeleton()
    for name in module.part_names:
        own, planned = (
            {key: tuple(p.shape) for key, p in each.part(name).named_parameters()} for each in (module, skeleton)
        )
        wrong = sorted(own.items() ^ planned.items())
        require(not wrong, f"{name} loads with other weights than build_skeleton plans, such as {wrong[:1]}")
        real = [key for key, p in skeleton.part(name).named_parameters() if p.device.type != "meta"]
        require(not real, f"build_skeleton makes weights: {name}.{(real or [''])[0]} is not on the meta device")


def check_skeleton_runs(factory: Factory) -> None:
    """task=plan measures activations on the skeleton: encoding and predicting run on the meta device."""
    skeleton = factory()
    skeleton.build_skeleton()
    skeleton.to("meta")
    batch = on_meta(a_batch(skeleton))
    with torch.no_grad():
        latents = skeleton.encode_image(batch.pixels)
        cond = skeleton.encode_prompt(CAPTIONS)
        noisy = skeleton.denoiser_input(latents, batch)
        predicted = skeleton.predict(noisy, torch.zeros(2, dtype=torch.long, device="meta"), cond, batch)
    require(fits(skeleton, predicted, latents), f"on meta, {tuple(latents.shape)} -> {tuple(predicted.shape)}")
