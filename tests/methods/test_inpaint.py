"""Widening a checkpoint to 9 input channels, and what comes out of training it."""

import json

import pytest
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from otl.config import CheckpointFormat, Output, SettingsError
from otl.methods.inpaint import Inpaint
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_2 import StableDiffusion2
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.testing import a_batch
from tests import tiny

FAMILIES = {"sd15": StableDiffusion, "sd2": StableDiffusion2, "sdxl": StableDiffusionXL}
U = torch.tensor([0.2, 0.8], dtype=torch.float64)


@pytest.fixture(params=FAMILIES)
def kind(request):
    return request.param


@pytest.fixture
def folder(request, kind):
    return request.getfixturevalue(f"{kind}_folder")


def made(kind, folder, method=None, **options):
    module = FAMILIES[kind](str(folder), **options)
    module.method = method
    module.configure_model()
    return module


@torch.no_grad()
def test_the_first_prediction_is_that_of_the_checkpoint(kind, folder):
    wide, narrow = made(kind, folder, Inpaint()), made(kind, folder)
    wide.part("denoiser").eval()  # as the other is; neither has dropout
    batch = a_batch(wide)
    latents = narrow.encode_image(batch.pixels)
    noisy = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    cond, t = narrow.encode_prompt(batch.captions), torch.tensor([20, 900])
    inputs = wide.denoiser_input(noisy, batch)
    assert inputs.shape[1] == 9 and inputs[:, 4:].abs().amax((2, 3)).min() > 0
    assert torch.equal(wide.predict(inputs, t, cond, batch), narrow.predict(noisy, t, cond, batch))


def test_the_new_channels_learn(kind, folder):
    module = made(kind, folder, Inpaint())
    assert module.part("denoiser").config.in_channels == 9
    before = module.part("denoiser").conv_in.weight.detach().clone()
    assert not before[:, 4:].any()
    optimizer = torch.optim.SGD(module.groups[0].params, lr=0.1)
    module.losses(a_batch(module), u=U, stream="noise").mean().backward()
    optimizer.step()
    change = (module.part("denoiser").conv_in.weight - before).abs().amax((0, 2, 3))
    assert (change > 0).all()  # mask and masked picture too


def test_an_inpainting_checkpoint_is_trained_as_it_is(tmp_path):
    checkpoint = tiny.sd15(tmp_path, in_channels=9)
    module = made("sd15", checkpoint, Inpaint())
    stored = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in module.part("denoiser").state_dict().items())


def test_parts_are_chosen_as_in_a_fine_tune(sd15_folder):
    module = made("sd15", sd15_folder, Inpaint(parts={"denoiser": {"lr": 1e-5}, "text_encoder": {}}))
    assert [(group.name, group.lr) for group in module.groups] == [("unet", 1e-5), ("text_encoder", None)]
    assert set(module.trained) == {"unet", "text_encoder"}


def test_the_denoiser_is_kept_in_fp32_where_the_rest_is_rounded(sd15_folder):
    module = made("sd15", sd15_folder, Inpaint(), dtype="bf16")
    assert {p.dtype for p in module.part("denoiser").parameters()} == {torch.float32}
    assert {p.dtype for p in module.part("text_encoder").parameters()} == {torch.bfloat16}


def test_a_widened_denoiser_that_does_not_train_is_refused(sd15_folder):
    with pytest.raises(SettingsError, match=r"method\.parts\.denoiser: .*do nothing unless it trains"):
        made("sd15", sd15_folder, Inpaint(parts={"text_encoder": {}}))


def test_a_family_without_an_inpainting_form_is_refused_before_any_weight(sd15_folder):
    class Other(StableDiffusion):
        inpaint_pipeline_class = None

    module = Other(str(sd15_folder))
    module.method = Inpaint()
    with pytest.raises(SettingsError, match="method=inpaint: Other has no inpainting form"):
        module.build_skeleton()


def test_the_plan_counts_the_new_weights(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    plain = StableDiffusion(str(sd15_folder))
    module.method = Inpaint()
    for each in (module, plain):
        each.build_skeleton()
    wide, narrow = (sum(p.numel() for p in each.part("denoiser").parameters()) for each in (module, plain))
    assert wide - narrow == 5 * 32 * 9 and module.inpaints


# Files


def trained(kind, folder):
    """Widened, and away from the start."""
    module = made(kind, folder, Inpaint())
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    module.output_options = Output(dtype="fp32")
    return module


def test_the_export_is_read_and_drawn_with_by_the_stock_pipeline(kind, folder, tmp_path):
    module = trained(kind, folder)
    module.draw(["a cat"], [0], steps=1, size=module_size(kind))  # as a run does before
    out = module.export(tmp_path / "final")
    stock = StableDiffusionXLInpaintPipeline if kind == "sdxl" else StableDiffusionInpaintPipeline
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == stock.__name__
    pipeline = stock.from_pretrained(out)
    assert pipeline.unet.config.in_channels == 9
    assert torch.equal(pipeline.unet.conv_in.weight, module.part("denoiser").conv_in.weight)
    pipeline.set_progress_bar_config(disable=True)
    size = module_size(kind)
    image, mask = Image.new("RGB", (size.w, size.h), "red"), Image.new("L", (size.w, size.h))
    mask.paste(255, (0, 0, size.w // 2, size.h))
    drawn = pipeline("a cat", image=image, mask_image=mask, height=size.h, width=size.w, num_inference_steps=2).images
    assert drawn[0].size == (size.w, size.h)


def module_size(kind):
    from otl.types import Size

    return Size(64, 128) if kind == "sdxl" else Size(32, 48)


def test_the_export_is_an_inpainting_checkpoint_of_the_same_family(kind, folder, tmp_path):
    module = trained(kind, folder)
    again = made(kind, module.export(tmp_path / "final"))
    assert again.inpaints
    batch = a_batch(module)
    with torch.no_grad():
        losses = [each.losses(batch, u=U, stream="noise") for each in (module, again)]
    assert torch.allclose(*losses, rtol=1e-5)


def test_a_single_file_has_nine_channels_and_says_what_it_is(sd15_folder, tmp_path):
    from safetensors import safe_open

    module = trained("sd15", sd15_folder)
    module.output_options = Output(dtype="fp32", checkpoint_format=CheckpointFormat.single_file)
    with safe_open(module.export(tmp_path / "final"), "pt") as file:
        conv = file.get_tensor("model.diffusion_model.input_blocks.0.0.weight")
        header = file.metadata()
    assert torch.equal(conv, module.part("denoiser").conv_in.weight)
    assert header["modelspec.architecture"] == "stable-diffusion-v1-inpainting"


def test_a_plain_checkpoint_stays_one(sd15_folder):
    assert type(made("sd15", sd15_folder).pipeline) is StableDiffusionPipeline
