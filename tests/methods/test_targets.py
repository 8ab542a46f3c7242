"""Which layers of which part a pattern means."""

import pytest

from otl.config import SettingsError
from otl.methods.finetune import Finetune
from otl.methods.lora import Lora
from otl.methods.targets import matching
from otl.modules.stable_diffusion import StableDiffusion

UNET = ["mid.attn1.to_q", "mid.ff", "up.attn1.to_k"]
TEXT = ["layers.0.self_attn.q_proj", "layers.0.mlp.fc1"]
BOTH = {"unet": UNET, "text_encoder": TEXT}


def test_patterns_are_searched_for_anywhere_in_the_path():
    assert matching({"unet": UNET}, [r"mid", r"to_k$"], {}) == {"unet": UNET}
    assert matching({"unet": UNET}, [r"to_k$", r"ff"], {}) == {"unet": UNET[1:]}


def test_a_pattern_may_be_meant_for_one_of_the_parts():
    found = matching(BOTH, ["attn1", "self_attn"], {})
    assert found == {"unet": [UNET[0], UNET[2]], "text_encoder": TEXT[:1]}


def test_a_preset_means_patterns_of_its_own_in_each_part():
    presets = {"unet": {"attn": ["attn1"]}, "text_encoder": {"attn": ["self_attn"]}}
    assert matching(BOTH, "attn", presets) == {"unet": [UNET[0], UNET[2]], "text_encoder": TEXT[:1]}


def test_a_pattern_that_matches_nothing_in_any_part_lists_what_exists():
    with pytest.raises(SettingsError, match=r"'attn9' matches no layer of unet or text_encoder\. .*up\.attn1.*N\.mlp"):
        matching(BOTH, ["attn1", "self_attn", "attn9"], {})


def test_a_part_in_which_nothing_matches_is_named():
    with pytest.raises(SettingsError, match=r"nothing matches a layer of text_encoder: .*text_encoder=null.*mlp\.fc1"):
        matching(BOTH, ["attn1"], {})


def test_a_misspelt_preset_names_the_nearest_and_how_to_give_a_pattern():
    with pytest.raises(SettingsError, match=r"did you mean attn-mlp\? .* a list, \[atn-mlp\]"):
        matching({"unet": UNET}, "atn-mlp", StableDiffusion.lora_targets)


@pytest.mark.parametrize("method", [Lora, Finetune])
def test_a_method_takes_patterns_for_several_parts(sd15_folder, method):
    module = StableDiffusion(str(sd15_folder))
    module.method = method(targets=["attn1", "self_attn"], parts={"denoiser": {}, "text_encoder": {}})
    module.build_skeleton()
    names = list(module.trained_parameters())
    assert any(".unet." in f".{name}" for name in names) and any(".text_encoder." in f".{name}" for name in names)
    assert all(("attn1" if "unet." in name else "self_attn") in name for name in names)
