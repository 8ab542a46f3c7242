"""Prior preservation: the frozen model's prediction is the target, and nothing else about the run changes."""

import pytest
import torch
from torch.nn import functional as F

from otl import testing
from otl.config import SettingsError
from otl.methods.finetune import Finetune
from otl.methods.lora import Lora
from otl.modules import prior
from otl.modules.stable_diffusion import StableDiffusion
from otl.types import Sample, Size

PARTS = {"denoiser": {}, "text_encoder": {}}


@pytest.fixture
def adapted(sd15_folder):
    """Random adapters on UNet and text encoder."""
    return testing.adapt(StableDiffusion(str(sd15_folder)))


def of_prior(module, *which):
    return testing.a_batch(module)._replace(prior=torch.tensor(which))


def test_the_target_is_what_the_model_predicts_without_its_adapters(adapted, sd15_folder):
    batch = of_prior(adapted, True, False)
    ours = adapted.losses(batch, u=testing.US, stream="noise")
    plain = adapted.losses(batch._replace(prior=None), u=testing.US, stream="noise")

    frozen = StableDiffusion(str(sd15_folder))
    frozen.configure_model()
    t = adapted.noise_schedule.sample(testing.US)
    with torch.no_grad():
        latents = adapted.encode_image(batch.pixels)
        noisy = adapted.noise_schedule.add(latents, adapted.draw_noise(batch, latents, t, "noise"), t)
        live = adapted.predict(noisy, t, adapted.encode_prompt(batch.captions), batch)
        expected = frozen.predict(noisy, t, frozen.encode_prompt(batch.captions), batch)
    torch.testing.assert_close(ours[0], F.mse_loss(live[0], expected[0]))
    torch.testing.assert_close(ours[1], plain[1])
    assert ours[0] > 0 and not torch.isclose(ours[0], plain[0], rtol=1e-3)


def test_a_new_adapter_has_nothing_to_preserve_yet(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.method = Lora(parts=PARTS)
    module.configure_model()
    assert module.losses(of_prior(module, True, True), u=testing.US, stream="noise").tolist() == [0.0, 0.0]


def test_gradients_flow_and_the_adapters_are_on_again(adapted):
    before = {name: p.requires_grad for name, p in adapted.named_parameters()}
    adapted.train()
    adapted.losses(of_prior(adapted, True, True), u=testing.US, stream="noise").mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in adapted.trained_parameters().values())
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == before
    assert not any(layer._disable_adapters for layer in prior.adapters(adapted))
    assert adapted.part("unet").training


@pytest.mark.parametrize("method", [Finetune(), Finetune(parts=PARTS)])
def test_where_no_frozen_model_is_left_it_is_refused(method, sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.method = method
    module.build_skeleton()
    sample = Sample(sd15_folder / "x.png", Size(64, 64), [""], concept="dogs", prior=True)
    with pytest.raises(SettingsError, match=r"data\.concepts\.dogs\.type=prior.*Finetune has none: take method=lora"):
        prior.check(module, [sample])
    prior.check(module, [Sample(sd15_folder / "x.png", Size(64, 64), [""])])
