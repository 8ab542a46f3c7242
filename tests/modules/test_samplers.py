"""Which timesteps a picture goes through, by which sampler; what a model cannot be drawn with is refused."""

import diffusers
import pytest
import torch

from otl.config import Sampler, SettingsError, TimestepSpacing
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_cascade import StableCascade
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.modules.wuerstchen import Wuerstchen
from otl.tasks.run import build_skeleton
from otl.types import Size
from tests import tiny, tiny_priors

STEPS = 4
# Table 2 of https://arxiv.org/abs/2305.08891 for 1000 timesteps, counted from 0, leading with diffusers' offset of 1
SPACED = {"leading": [751, 501, 251, 1], "trailing": [999, 749, 499, 249], "linspace": [999, 666, 333, 0]}
DPM = diffusers.DPMSolverMultistepScheduler
KINDS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPM, {}),
    "dpmpp_2m_karras": (DPM, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}


def loaded(family, folder, **options):
    module = family(str(folder), **options)
    module.configure_model()
    module.data_resolution = 32
    return module


@pytest.fixture(scope="module")
def sd15(sd15_folder):
    return loaded(StableDiffusion, sd15_folder)


@pytest.fixture(scope="module")
def sdxl(sdxl_folder):
    return loaded(StableDiffusionXL, sdxl_folder)


def visited(module, **options):
    """The timesteps that the denoiser is asked at."""
    seen = []

    def note(_, arguments, given):
        t = given["timestep"] if "timestep" in given else arguments[1]
        seen.append(t.flatten()[0].item())

    hook = module.part("denoiser").register_forward_pre_hook(note, with_kwargs=True)
    try:
        module.draw(["a cat"], [0], steps=STEPS, **options)
    finally:
        hook.remove()
    return seen


def picture(module, *, seeds=(3,), **options):
    return [each.tobytes() for each in module.draw(["a cat"] * len(seeds), list(seeds), steps=STEPS, **options)]


@pytest.mark.parametrize("spacing", TimestepSpacing)
@pytest.mark.parametrize(
    ("family", "sampler"),
    [("sd15", None), ("sd15", Sampler.euler), ("sd15", Sampler.euler_a), ("sdxl", None), ("sdxl", Sampler.ddim)],
)
def test_the_pipeline_goes_through_the_timesteps_of_the_spacing(request, family, sampler, spacing):
    module = request.getfixturevalue(family)
    assert visited(module, sampler=sampler, timestep_spacing=spacing) == pytest.approx(SPACED[spacing.value])


def test_without_settings_it_goes_through_the_checkpoint_s_own(sd15):
    assert sd15.pipeline.scheduler.config.timestep_spacing == "leading"
    assert visited(sd15) == SPACED["leading"]
    assert visited(sd15, sampler=Sampler.euler) == SPACED["leading"]


def test_a_spacing_alone_keeps_the_checkpoint_s_sampler(sdxl):
    own = sdxl.pipeline.scheduler
    with sdxl.sampling_scheduler():
        assert sdxl.pipeline.scheduler is own
    given = {"timestep_spacing": TimestepSpacing.trailing}
    assert picture(sdxl, **given) == picture(sdxl, sampler=Sampler.euler, **given) != picture(sdxl)
    assert sdxl.pipeline.scheduler is own and own.config.timestep_spacing == "leading"


@pytest.mark.parametrize("name", KINDS)
def test_a_sampler_is_the_scheduler_that_diffusers_has_for_it(sd15, sd15_folder, name):
    kind, options = KINDS[name]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    generator = torch.Generator().manual_seed(3)
    stock = pipe("a cat", negative_prompt="", num_inference_steps=STEPS, generator=generator, height=32, width=32)
    assert picture(sd15, sampler=Sampler[name]) == [stock.images[0].tobytes()]


def test_every_sampler_has_a_name():
    assert {each.value for each in Sampler} == KINDS.keys()


@pytest.mark.parametrize("sampler", [Sampler.ddpm, Sampler.euler_a, Sampler.dpmpp_2m_sde])
def test_noise_on_the_way_is_each_seed_s_own(sd15, sampler):
    both = picture(sd15, seeds=(3, 4), sampler=sampler)
    assert both == picture(sd15, sampler=sampler) + picture(sd15, seeds=(4,), sampler=sampler)


def test_a_transformer_that_learns_the_variance_is_drawn_by_any(tmp_path):
    module = loaded(PixArtAlpha, tiny.pixart_alpha(tmp_path))
    spacing = {"sampler": Sampler.euler, "timestep_spacing": TimestepSpacing.trailing, "size": Size(32, 48)}
    assert visited(module, **spacing) == SPACED["trailing"]


@pytest.mark.parametrize("sampler", [None, *(each for each in Sampler if each is not Sampler.dpmpp_2m_karras)])
def test_with_zero_terminal_snr_a_picture_begins_at_pure_noise(sd15_folder, sampler):
    module = loaded(StableDiffusion, sd15_folder, prediction="v_prediction", zero_terminal_snr=True)
    assert visited(module, sampler=sampler) == pytest.approx(SPACED["trailing"])
    with module.sampling_scheduler():
        config = module.pipeline.scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["sample.sampler=dpmpp_2m_karras", "sample.timestep_spacing=trailing"],
            "timestep_spacing=trailing: would have",
        ),
        (["sample.timestep_spacing=leading", "+model.zero_terminal_snr=true"], "timestep_spacing=leading: with zero"),
        (["sample.sampler=dpmpp_2m_karras", "+model.zero_terminal_snr=true"], "near pure noise"),
    ],
)
def test_what_would_spoil_the_pictures_is_refused_before_weights_are_loaded(settings, sd15_folder, lines, message):
    own = [f"model.checkpoint={sd15_folder}", "logger=none", "+model.prediction=v_prediction", *lines]
    with pytest.raises(SettingsError, match=message):
        build_skeleton(settings("model=sd15", *own))


@pytest.mark.parametrize(("family", "build"), tiny_priors.FAMILIES.values(), ids=tiny_priors.FAMILIES)
@pytest.mark.parametrize("line", ["sample.sampler=euler", "sample.timestep_spacing=trailing"])
def test_a_schedule_of_its_own_takes_no_sampler(settings, family, build, line, tmp_path):
    name = {Wuerstchen: "wuerstchen", StableCascade: "stable_cascade"}[family]
    others = [f"model.{key}={path}" for key, path in tiny_priors.options(tmp_path).items()]
    build(tmp_path)
    with pytest.raises(SettingsError, match=f"{line}: {family.__name__} has a noise schedule of its own"):
        build_skeleton(settings(f"model={name}", f"model.checkpoint={tmp_path}", "logger=none", *others, line))


def test_karras_levels_are_the_same_whatever_the_spacing(sd15):
    config = sd15.pipeline.scheduler.config
    levels = []
    for spacing in SPACED:
        scheduler = DPM.from_config(config, use_karras_sigmas=True, timestep_spacing=spacing)
        scheduler.set_timesteps(STEPS)
        levels.append(scheduler.sigmas)
    assert torch.equal(levels[0], levels[1]) and torch.equal(levels[1], levels[2])
