"""A denoiser with 9 input channels: compared with the parts of diffusers' own inpainting pipelines."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image

from otl import rng
from otl.config import Inpaint, MaskResize, SampleOptions, SettingsError
from otl.modules import inpainting
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.testing import CHECKS, a_batch
from otl.types import Sample, Size
from tests import tiny
from tests.datamodules.fakes import picture

SIZE = Size(64, 32)
STOCK = {"sd15": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline}
FAMILIES = {"sd15": StableDiffusion, "sdxl": StableDiffusionXL}
U = torch.tensor([0.2, 0.8], dtype=torch.float64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny.BUILDERS[name](tmp_path_factory.mktemp(name), in_channels=9) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def kind(request):
    return request.param


def loaded(kind, folders):
    module = FAMILIES[kind](str(folders[kind]))
    module.configure_model()
    return module


@pytest.fixture
def module(kind, folders):
    return loaded(kind, folders)


def batch(module):
    """Two pictures, one with a hole of odd sides, one masked whole."""
    made = a_batch(module)
    mask = torch.zeros(2, 1, *made.pixels.shape[2:])
    mask[0, :, 5:18, 7:24] = 1
    mask[1] = 1
    return made._replace(mask=mask)


def unet_arguments(module, cond, made):
    """What the unet takes beside latents and timesteps, written out."""
    if "pooled" not in cond:
        return {"encoder_hidden_states": cond["hidden"]}
    ids = torch.cat([made.original_size, made.crop, made.target_size], 1).float()
    added = {"text_embeds": cond["pooled"], "time_ids": ids}
    return {"encoder_hidden_states": cond["hidden"], "added_cond_kwargs": added}


@torch.no_grad()
def test_the_loss_is_that_of_diffusers_parts(kind, module, folders):
    made = batch(module)
    losses = module.losses(made, u=U, stream="noise")

    stock = STOCK[kind].from_pretrained(folders[kind])
    scale = stock.vae.config.scaling_factor
    latents = stock.vae.encode(made.pixels).latent_dist.mode() * scale
    noise = rng.normals(made.key, tuple(latents.shape[1:]), "noise")
    t = module.noise_schedule.sample(U)
    alphas = stock.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    hidden = made.pixels * (made.mask < 0.5)  # as the pipelines' __call__ has it
    masked = stock.vae.encode(hidden).latent_dist.mode() * scale
    mask, masked = stock.prepare_mask_latents(
        made.mask, masked, 2, *made.pixels.shape[2:], torch.float32, torch.device("cpu"), None, False
    )
    cond = module.encode_prompt(made.captions)
    predicted = stock.unet(torch.cat([noisy, mask, masked], 1), t, **unet_arguments(module, cond, made)).sample
    expected = (predicted - noise).square().mean((1, 2, 3))
    assert torch.allclose(losses, expected, rtol=1e-4)


@torch.no_grad()
def test_what_the_mask_hides_does_not_reach_the_denoiser(module):
    made = batch(module)
    noisy = torch.zeros_like(module.encode_image(made.pixels))
    repainted = torch.where(made.mask > 0.5, torch.rand_like(made.pixels), made.pixels)
    one, other = (module.denoiser_input(noisy, each) for each in (made, made._replace(pixels=repainted)))
    assert one.shape[1] == 9 and torch.equal(one, other)
    brighter = module.denoiser_input(noisy, made._replace(pixels=made.pixels + 0.5))
    assert not torch.equal(one[0], brighter[0])
    assert torch.equal(one[1], brighter[1])  # masked whole


@torch.no_grad()
def test_masked_latents_of_the_cache_take_the_place_of_pixels(module):
    made = batch(module)
    masked = module.encode_image(torch.where(made.mask > 0.5, torch.zeros_like(made.pixels), made.pixels))
    cached = made._replace(latents=module.encode_image(made.pixels), pixels=None, masked=masked)
    assert torch.equal(module.losses(cached, u=U, stream="noise"), module.losses(made, u=U, stream="noise"))


def test_a_mask_is_shrunk_by_the_nearest_pixel_or_by_area():
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, 0, 0] = mask[0, 0, 3, 3] = mask[0, 0, 2:, 0] = 1
    assert inpainting.shrunk(mask, (2, 2), MaskResize.nearest)[0, 0].tolist() == [[1, 0], [1, 0]]
    assert inpainting.shrunk(mask, (2, 2), MaskResize.area)[0, 0].tolist() == [[0.25, 0], [0.5, 0.25]]


def test_the_stock_inpainting_pipeline_takes_the_place_of_the_family_s(kind, module, folders):
    assert type(module.pipeline) is STOCK[kind]
    plain = STOCK[kind].from_pretrained(folders[kind])
    assert module.pipeline.config.keys() - {"_name_or_path"} == plain.config.keys() - {"_name_or_path"}


def canvas(size=SIZE):
    pixels = torch.linspace(-1, 1, 3 * size.area).reshape(3, *size)
    mask = torch.zeros(1, *size)
    mask[:, 8:40, 4:20] = 1
    return inpainting.Canvas(pixels, mask)


def test_drawing_is_what_the_stock_pipeline_draws(kind, module, folders):
    hole = canvas()
    options = {"negative_prompt": "blurry", "steps": 3}
    drawn = module.draw(["a cat"], [5], guidance=3.0, size=SIZE, canvases=[hole], **options)[0]

    stock = STOCK[kind].from_pretrained(folders[kind])
    stock.set_progress_bar_config(disable=True)
    masked = module.encode_image((hole.pixels * (1 - hole.mask))[None])
    expected = stock(
        "a cat",
        negative_prompt="blurry",
        image=(hole.pixels[None] + 1) / 2,
        mask_image=hole.mask[None],
        masked_image_latents=masked.detach(),
        strength=1.0,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=SIZE.h,
        width=SIZE.w,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    difference = torch.tensor(list(drawn.tobytes())).float() - torch.tensor(list(expected.tobytes())).float()
    assert drawn.size == expected.size == (SIZE.w, SIZE.h)
    assert difference.abs().max() <= 1  # rounding


def test_what_is_drawn_depends_on_picture_and_mask(module):
    hole = canvas()
    others = [hole, hole._replace(pixels=-hole.pixels), hole._replace(mask=1 - hole.mask)]
    drawn = module.draw(["a cat"] * 3, [5] * 3, steps=2, size=SIZE, canvases=others)
    assert len({picture.tobytes() for picture in drawn}) == 3
    empty = module.draw(["a cat"], [5], steps=2, size=SIZE)[0]
    assert (
        empty.tobytes()
        == module.draw(["a cat"], [5], steps=2, size=SIZE, canvases=[inpainting.empty(SIZE)])[0].tobytes()
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_an_inpainting_model_keeps_the_contract(check, folders):
    check(lambda: StableDiffusion(str(folders["sd15"])))


# Settings


@pytest.mark.parametrize(
    ("setting", "text"),
    [({"whole": 0.5}, "inpaint.whole=0.5"), ({"resize": MaskResize.area}, "inpaint.resize=area")],
)
def test_settings_of_masks_are_refused_where_there_are_none(sd15_folder, setting, text):
    module = StableDiffusion(str(sd15_folder))
    module.inpaint_options = dataclasses.replace(Inpaint(), **setting)
    module.build_skeleton()
    with pytest.raises(SettingsError, match=rf"{text}: .*model=sd15_inpaint.*method=inpaint"):
        inpainting.check_settings(module)
    module.inpaint_options = Inpaint()
    inpainting.check_settings(module)


def test_pictures_to_paint_in_are_refused_where_there_is_no_hole(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.sample_options = SampleOptions(image="a.png", mask="b.png")
    module.build_skeleton()
    with pytest.raises(SettingsError, match=r"sample\.image=a\.png: .*takes no mask"):
        inpainting.check_settings(module)


def test_a_family_without_an_inpainting_form_says_so(sd15_folder):
    class Other(StableDiffusion):
        inpaint_pipeline_class = None

    module = Other(str(sd15_folder))
    module.inpaint_options = Inpaint(boxes=1.0)
    module.build_skeleton()
    with pytest.raises(SettingsError, match="Other has no inpainting form"):
        inpainting.check_settings(module)


def test_canvases_are_cut_from_the_files_one_for_each_prompt(tmp_path):
    photo = picture(tmp_path / "photo.png", h=60, w=40, shade=200)
    masks = []
    for number, box in enumerate([(0, 0, 40, 20), (0, 40, 40, 60)]):
        mask = Image.new("L", (40, 60))
        mask.paste(255, box)
        mask.save(tmp_path / f"{number}.png")
        masks.append(str(tmp_path / f"{number}.png"))
    options = SampleOptions(prompts=["a", "b"], image=str(photo), mask=masks)
    one, two = inpainting.canvases(options, Size(96, 64), "white")
    assert one.pixels.shape == (3, 96, 64) and torch.equal(one.pixels, two.pixels)
    assert one.mask[0, :31].all() and not one.mask[0, 33:].any()
    assert two.mask[0, 65:].all() and not two.mask[0, :63].any()
    assert inpainting.canvases(SampleOptions(prompts=["a"]), Size(96, 64), "white") is None


def test_a_mask_of_another_shape_than_its_picture_is_refused(tmp_path):
    photo, mask = picture(tmp_path / "photo.png", h=60, w=40), picture(tmp_path / "mask.png", h=40, w=60)
    options = SampleOptions(prompts=["a"], image=str(photo), mask=str(mask))
    with pytest.raises(SettingsError, match=r"sample\.mask=.*40x60 .* does not have the shape of photo\.png, 60x40"):
        inpainting.canvases(options, SIZE, "white")


def test_the_first_picture_is_painted_in_where_none_is_given_and_never_all_of_it(tmp_path):
    photo = picture(tmp_path / "photo.png", h=60, w=40)
    sample = Sample(photo, Size(60, 40), [""])
    for seed in range(8):
        made = inpainting.first_canvas(sample, SIZE, "white", options=Inpaint(), seed=seed)
        assert made.pixels.shape == (3, *SIZE) and 0 < made.mask.mean() < 0.6
    own = inpainting.first_canvas(dataclasses.replace(sample, mask=photo), SIZE, "white", options=Inpaint(), seed=0)
    assert own.mask.shape == (1, *SIZE)
