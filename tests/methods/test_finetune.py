"""Which weights a fine-tune trains, and that the others stay."""

import pytest
import torch

from otl.config import SettingsError
from otl.methods.finetune import Finetune
from otl.methods.inpaint import Inpaint
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_diffusion import StableDiffusion
from otl.testing import a_batch
from tests import tiny

U = torch.tensor([0.2, 0.8], dtype=torch.float64)
BOTH = {"denoiser": {}, "text_encoder": {"lr": 1e-6}}


def made(folder, method):
    module = StableDiffusion(str(folder))
    module.method = method
    module.configure_model()
    return module


def trained(folder, **options):
    """part -> names of what trains."""
    module = made(folder, Finetune(**options))
    return {
        part: [name for name, p in module.part(part).named_parameters() if p.requires_grad]
        for part in ("unet", "text_encoder", "vae")
    }


def all_of(folder, part):
    return [name for name, _ in made(folder, None).part(part).named_parameters()]


def test_without_targets_every_weight_of_the_chosen_parts_trains(sd15_folder):
    assert trained(sd15_folder) == {"unet": all_of(sd15_folder, "unet"), "text_encoder": [], "vae": []}
    both = trained(sd15_folder, parts=BOTH)
    assert (both["text_encoder"], both["vae"]) == (all_of(sd15_folder, "text_encoder"), [])


def test_a_preset_means_the_layers_of_the_family_s_preset_norms_among_them(sd15_folder):
    found = trained(sd15_folder, targets="attn-mlp")["unet"]
    assert found == [name for name in all_of(sd15_folder, "unet") if "attentions" in name]
    assert any("norm" in name for name in found)


def test_patterns_choose_and_exclusions_take_away(sd15_folder):
    found = trained(sd15_folder, targets=[r"attn2\.", r"^conv_out"], exclude=[r"to_out"])["unet"]
    expected = [name for name in all_of(sd15_folder, "unet") if "attn2." in name or name.startswith("conv_out")]
    assert found == [name for name in expected if "to_out" not in name] and len(found) < len(expected)


def test_only_what_is_chosen_gets_a_gradient_and_each_part_has_its_learning_rate(sd15_folder):
    module = made(sd15_folder, Finetune(targets=["attn"], parts=BOTH))
    module.losses(a_batch(module), u=U, stream="noise").mean().backward()
    own = {id(parameter) for group in module.groups for parameter in group.params}
    assert [(group.name, group.lr) for group in module.groups] == [("unet", None), ("text_encoder", 1e-6)]
    for part in ("unet", "text_encoder"):
        for name, parameter in module.part(part).named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in own), name
    assert set(module.state_dict()) == {
        f"trained.{part}.{name}" for part, names in trained(sd15_folder, targets=["attn"], parts=BOTH).items()
        for name in names
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["attn9"]}, r"method\.targets: 'attn9' matches no layer of unet"),
        ({"targets": "attn-mpl"}, r"did you mean attn-mlp\?"),
        ({"targets": ["attn1"], "exclude": "attn2"}, r"method\.exclude: 'attn2' matches no layer that would be"),
        ({"exclude": [""]}, "method.exclude leaves no layer of unet"),
        ({"parts": {"denoiser": {}, "unet": {}}}, r"method\.parts\.unet: unet is named twice"),
    ],
)
def test_a_pattern_that_finds_nothing_is_refused(sd15_folder, options, message):
    module = StableDiffusion(str(sd15_folder))
    module.method = Finetune(**options)
    with pytest.raises(SettingsError, match=message):
        module.build_skeleton()


def test_new_input_channels_must_be_among_what_trains(sd15_folder):
    with pytest.raises(SettingsError, match="leave out conv_in"):
        made(sd15_folder, Inpaint(targets="attn-mlp"))
    module = made(sd15_folder, Inpaint(targets=["attentions", "conv_in"]))
    assert module.part("denoiser").conv_in.weight.requires_grad
    assert not module.part("denoiser").conv_out.weight.requires_grad


def test_a_weight_that_two_layers_share_trains_once(tmp_path):
    module = PixArtAlpha(str(tiny.pixart_alpha(tmp_path)))
    module.method = Finetune(parts={"denoiser": {}, "text_encoder": {}})
    module.configure_model()
    weights = [id(parameter) for parameter in module.groups[1].params]
    assert sorted(weights) == sorted(id(p) for p in module.part("text_encoder").parameters())
