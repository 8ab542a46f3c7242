"""On a device that is not the CPU: nothing is mixed up, a step waits for nothing, and the loss is that of the CPU; nor
does it do what no GPU can do deterministically.

The device is `tests/pretend.py`. Functions that are no tests run in the process of the fixture `apart`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from otl.config import HuberSchedule, Loss, LossMix, LossType, LossWeight, NoiseOptions, TimestepDistribution
from otl.methods.adapter import Adapter
from otl.methods.lora import Lora
from otl.methods.oft import Oft
from otl.modules.base import DiffusionModule
from otl.registry import families
from otl.testing.inputs import US, a_batch, bucket, holes
from otl.testing.training import ADAPTERS
from otl.types import Batch
from tests import pretend, tiny, tiny_priors

FAMILIES = [*tiny.BUILDERS, *tiny_priors.FAMILIES]
NOISE = NoiseOptions(
    offset=0.1,
    offset_random_strength=True,
    offset_generalized=True,
    multires_iterations=3,
    perturbation=0.1,
    timesteps=TimestepDistribution.beta,
    shift=2.0,
    min_timestep=0.1,
)
LOSS = Loss(
    type=LossType.huber,
    huber_schedule=HuberSchedule.snr,
    weight=LossWeight.min_snr,
    masked=True,
    unmasked_probability=0.5,
    normalize_masked_area=True,
)
MIXED = Loss(mix=LossMix(mse=1.0, huber=0.5, log_cosh=0.5), weight=LossWeight.debiased)
FEW = Lora(rank=2, alpha=1.0, targets="attn-only")


def made(family: str, folder: Path, **options: Any) -> DiffusionModule:
    """With a tiny checkpoint in `folder`."""
    prior = tiny_priors.FAMILIES.get(family)
    if not folder.exists():
        (prior[1] if prior else tiny.BUILDERS[family])(folder)
    return families()[family].load()(str(folder), **(tiny_priors.options(folder) if prior else {}), **options)


def loaded(module: DiffusionModule, method: Adapter = FEW) -> DiffusionModule:
    """With an adapter that is not nothing, and without the dropout that a prior has."""
    module.method = method
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for name in module.part_names:
        module.part(name).eval()
    return module


def placed(module: DiffusionModule, device: torch.device) -> DiffusionModule:
    """All of it on the device."""
    module.to(device)
    for name in module.part_names:
        module.part(name).to(device)
    return module


def cached(module: DiffusionModule) -> Batch:
    """A batch as the loader has it, with what the encoders gave; one of its samples is a prior."""
    batch = a_batch(module)
    with torch.no_grad():
        latents, cond = module.encode_image(batch.pixels), module.encode_prompt(batch.captions)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    kept = batch.pixels if module.inpaints else None
    more = {"pixels": kept, "mask": holes(bucket(module)), "prior": torch.tensor([True, False])}
    return batch._replace(latents=latents, cond=cond, noise=noise, **more)


def moved(module: DiffusionModule, batch: Batch) -> Batch:
    """As Lightning hands it on."""
    found = module.transfer_batch_to_device(batch, module.device, 0)
    assert found.key.device.type == "cpu", "the keys of what is random have left the CPU"
    return found


def trained(module: DiffusionModule, batch: Batch) -> Tensor:
    """[2] losses that have gone backward."""
    found = module.losses(batch, u=US, stream="noise")
    found.mean().backward()
    return found.detach()


def a_step_of(module: DiffusionModule) -> tuple[list[float], list[float], list[str]]:
    """Losses on the CPU and on the device, and what the step there has waited for."""
    batch = cached(module)
    with torch.no_grad():
        expected = module.losses(batch, u=US, stream="noise").tolist()
    with pretend.pretended() as device:
        batch = moved(placed(module, device), batch)
        pretend.waits.clear()
        found = trained(module, batch)
        waits = list(pretend.waits)
        return expected, found.tolist(), waits


def a_familys_step(family: str, folder: Path) -> tuple[list[float], list[float], list[str]]:
    module = made(family, folder)
    module.noise_options, module.loss_options = NOISE, LOSS
    return a_step_of(loaded(module))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_mixes_nothing_waits_for_nothing_and_has_the_loss_of_the_cpu(apart, folders, family):
    expected, found, waits = apart(a_familys_step, family, folders / family)
    assert waits == []
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def a_step_with(kind: str, folder: Path) -> tuple[list[float], list[float], list[str]]:
    module, method = made("sd2", folder), ADAPTERS[kind]()
    module.loss_options = MIXED
    method.targets = "attn-only"
    return a_step_of(loaded(module, method))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_so_does_one_of_every_kind_of_adapter(apart, folders, kind):
    expected, found, waits = apart(a_step_with, kind, folders / "sd2")
    assert waits == []
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def a_mixed_step(family: str, folder: Path, dtype: torch.dtype) -> tuple[list[float], list[float], list[str]]:
    """Losses in fp32 on the CPU, those in mixed precision on the device, and dtypes of the gradients."""
    exact, module = loaded(made(family, folder)), made(family, folder)
    module.autocast_dtype = dtype
    batch = cached(exact)
    with torch.no_grad():
        expected = exact.losses(batch, u=US, stream="noise").tolist()
    with pretend.pretended() as device:
        placed(loaded(module), device)
        with torch.autocast(device.type, dtype, cache_enabled=False):  # as Lightning has it
            found = module.losses(moved(module, batch), u=US, stream="noise")
        found.mean().backward()
        with torch.autocast(device.type, dtype, cache_enabled=False), torch.no_grad():
            module.spaced_losses(moved(module, a_batch(module)), 1)
    gradients = {str(parameter.grad.dtype) for parameter in module.trained_parameters().values()}
    return expected, found.tolist(), sorted(gradients)


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in FAMILIES), ("pixart_alpha", torch.float16)]
)
def test_in_mixed_precision_a_step_is_nearly_that_of_fp32_and_mixes_no_dtypes(apart, folders, family, dtype):
    """By CUDA's own lists of what autocast casts, with frozen weights in 16 bits."""
    expected, found, gradients = apart(a_mixed_step, family, folders / family, dtype)
    assert gradients == ["torch.float32"]
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)


def what_dropout_waits_for(folder: Path) -> list[str]:
    module = loaded(made("sd15", folder), Oft(block_size=4, dropout=0.5, targets="attn-only"))
    batch = cached(module)
    with pretend.pretended() as device:
        batch = moved(placed(module, device).train(), batch)
        pretend.waits.clear()
        trained(module, batch)
        return list(pretend.waits)


def test_nor_does_the_dropout_of_rotations_wait(apart, folders):
    assert apart(what_dropout_waits_for, folders / "sd15") == []


def what_is_not_cached(family: str, folder: Path, options: dict[str, Any]) -> list[str]:
    """Where pixels and captions come to in a step of validation, and in decoding."""
    module = loaded(made(family, folder, **options))
    with pretend.pretended() as device, torch.no_grad():
        batch = moved(placed(module, device), a_batch(module))
        losses, pixels = module.spaced_losses(batch, 1), module.decode_image(module.encode_image(batch.pixels))
        return [losses.device.type, pixels.device.type]


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_validation_and_decoding_mix_nothing(apart, folders, family):
    pure = {"prediction": "v_prediction", "zero_terminal_snr": True} if family == "sd15" else {}
    assert apart(what_is_not_cached, family, folders / family, pure) == [pretend.NAME, pretend.NAME]


def an_inpainting_models_step(folder: Path) -> tuple[list[float], list[float], list[str]]:
    tiny.sd15(folder, in_channels=9)
    return a_step_of(loaded(made("sd15", folder)))


def test_an_inpainting_models_step_mixes_nothing(apart, tmp_path):
    expected, found, waits = apart(an_inpainting_models_step, tmp_path / "inpainting")
    assert waits == []
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def begun(folder: Path, device: str) -> dict[str, list[float]]:
    """What trains, the noise schedule and a timestep, loaded as Lightning has it loaded: the device is the default."""
    module = made("sdxl", folder)
    word = {"dog": {"placeholder": "<dog>", "output": True}}
    module.method = Lora(rank=2, embeddings=word)
    module.noise_options = NOISE
    with pretend.pretended() as there, there if device == pretend.NAME else torch.device("cpu"):
        module._device = torch.get_default_device()  # as Lightning has it said before
        module.configure_model()
    parameters = module.trained_parameters() | {"schedule": module.noise_schedule.alpha_bars}
    assert {each.device.type for each in parameters.values()} == {"cpu"}
    steps = module.noise_schedule.sample(module.timesteps(US))
    return {name: each.flatten().tolist() for name, each in (parameters | {"steps": steps}).items()}


def test_a_model_is_the_same_whatever_torchs_default_device_is(apart, folders):
    """Lightning makes its device the default while a model is loaded."""
    assert apart(begun, folders / "sdxl", pretend.NAME) == apart(begun, folders / "sdxl", "cpu")


def mixed_up() -> None:
    with pretend.pretended() as device:
        torch.zeros(3, device=device) + torch.zeros(3)


def looked_up() -> None:
    with pretend.pretended() as device:
        torch.zeros(3)[torch.zeros(2, dtype=torch.long, device=device)]


def summed_up() -> None:
    with pretend.pretended() as device:
        torch.zeros(3, device=device).cumsum(0)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(mixed_up, pretend.MixedDevices), (looked_up, pretend.MixedDevices), (summed_up, pretend.Undetermined)],
)
def test_what_a_gpu_would_refuse_is_refused(apart, wrong, error):
    with pytest.raises(error):
        apart(wrong)
