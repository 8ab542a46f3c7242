"""Files to go on from: every tool's names, every way to say how strong, and what does not fit."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from otl.config import LoraFormat, Output, SettingsError
from otl.formats.files import read
from otl.formats.original import sgm_unet_names
from otl.methods.injected import adapted, live_state
from otl.methods.loha import Loha
from otl.methods.lokr import Lokr
from otl.methods.lora import Dora, Lora
from otl.methods.oft import Oft
from otl.methods.targets import layers
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from tests.methods.kinds import KINDS, assert_same_layers, module_of, trained

BOTH = {"denoiser": {}, "text_encoder": {}}
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


@pytest.fixture(scope="module")
def source(sd15_folder):
    """A LoRA on attention, of two strengths."""
    method = Lora(rank=4, alpha=3.0, ranks={"to_k": 2}, parts=BOTH | {"text_encoder": {"alpha": 1.0}})
    return trained(StableDiffusion, sd15_folder, method)


def resumed(folder, file, *, family=StableDiffusion, method=Lora, parts=BOTH, targets="file", **options):
    module = module_of(family, folder)
    module.method = method(from_file=str(file), parts=parts, targets=targets, **options)
    module.configure_model()
    return module


def text(path):
    return f"text_model.{path}"


def spelled(module, *, unet, text_encoder, ends, alphas=True, folded=False):
    """The tensors of a LoRA under other names.

    Args:
        unet: path -> what its keys begin with.
        text_encoder: likewise.
        ends: of down and up.
        folded: the strength is multiplied into the second matrix.
    """
    tensors = {}
    for part, stem in (("unet", unet), ("text_encoder", text_encoder)):
        for path, layer in live_state(module)[part].items():
            scale = layer.alpha / len(layer.down) if folded else 1
            tensors[stem(path) + ends[0]] = layer.down
            tensors[stem(path) + ends[1]] = layer.up * scale
            if alphas and not folded:
                tensors[stem(path) + ".alpha"] = torch.tensor(layer.alpha)
    return tensors


def sgm(module):
    """Paths of the UNet's layers as the original code has them."""
    return sgm_unet_names(dict(module.part("unet").config), list(live_state(module)["unet"]))


def under(path):
    return path.replace(".", "_")


def kohya(module):
    return spelled(
        module,
        unet=lambda path: f"lora_unet_{under(path)}",
        text_encoder=lambda path: f"lora_te_{under(text(path))}",
        ends=KOHYA,
    )


def kohya_sgm(module):
    names = sgm(module)
    return spelled(
        module,
        unet=lambda path: f"lora_unet_{under(names[path])}",
        text_encoder=lambda path: f"lora_te1_{under(text(path))}",
        ends=KOHYA,
    )


def diffusers_folded(module):
    return spelled(
        module,
        unet=lambda path: f"unet.{path}",
        text_encoder=lambda path: f"text_encoder.{text(path)}",
        ends=PEFT,
        folded=True,
    )


def diffusers_flat(module):
    """As transformers 5.6 and newer name their modules."""
    return spelled(
        module,
        unet=lambda path: f"unet.{path}",
        text_encoder=lambda path: f"text_encoder.{path}",
        ends=(".lora.down.weight", ".lora.up.weight"),
        folded=True,
    )


def comfy(module):
    names = sgm(module)
    return spelled(
        module,
        unet=lambda path: f"diffusion_model.{names[path]}",
        text_encoder=lambda path: f"text_encoders.clip_l.transformer.{text(path)}",
        ends=PEFT,
    )


def mixed_lycoris(module):
    return spelled(
        module,
        unet=lambda path: f"lycoris_{under(path)}",
        text_encoder=lambda path: f"lora_te_{under(path)}",
        ends=KOHYA,
    )


@pytest.mark.parametrize("style", [kohya, kohya_sgm, diffusers_folded, diffusers_flat, comfy, mixed_lycoris])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tool_s_names_give_the_same_deltas(sd15_folder, tmp_path, source, style, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in style(source).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_same_layers(source, resumed(sd15_folder, tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"])
def test_attention_processors_of_early_diffusers(sd15_folder, tmp_path, file):
    source = trained(StableDiffusion, sd15_folder, Lora(rank=4, alpha=4.0, targets="attn-only"))
    tensors = {}
    for path, layer in live_state(source)["unet"].items():
        attention, name = path.removesuffix(".0").rsplit(".", 1)
        tensors[f"unet.{attention}.processor.{name}_lora.down.weight"] = layer.down
        tensors[f"unet.{attention}.processor.{name}_lora.up.weight"] = layer.up
    (torch.save if file.endswith(".bin") else save_file)(tensors, tmp_path / file)
    assert_same_layers(source, resumed(sd15_folder, tmp_path / file, parts={"denoiser": {}}))


@pytest.mark.parametrize("with_header", [True, False])
def test_what_diffusers_saves_has_the_strength_its_header_says(sd15_folder, tmp_path, with_header):
    """Without the header diffusers itself takes alpha for the rank."""
    source = trained(StableDiffusion, sd15_folder, Lora(rank=4, alpha=3.0 if with_header else 4.0, parts=BOTH))
    config = {"r": 4, "lora_alpha": 3.0, "target_modules": ["to_q"], "peft_type": "LORA"}
    parts = {
        "unet_lora_layers": get_peft_model_state_dict(source.part("unet")),
        "text_encoder_lora_layers": get_peft_model_state_dict(source.part("text_encoder")),
    }
    headers = {"unet_lora_adapter_metadata": config, "text_encoder_lora_adapter_metadata": config}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **parts, **(headers if with_header else {}))
    again = resumed(sd15_folder, tmp_path / "pytorch_lora_weights.safetensors")
    assert_same_layers(source, again)
    assert {layer.alpha for layer in live_state(again)["unet"].values()} == {3.0 if with_header else 4.0}


def test_a_folder_of_peft_s_with_its_own_alphas(sd15_folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"attn1.to_q": 2})
    model = get_peft_model(unet, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    for file in (tmp_path, tmp_path / "adapter_model.safetensors"):
        again = resumed(sd15_folder, file, parts={"denoiser": {}})
        found = {path: layer.alpha for path, layer in live_state(again)["unet"].items()}
        assert found == {path: 2.0 if path.endswith("attn1.to_q") else 6.0 for path in found}
        live = dict(unet.named_modules())
        for path, layer in adapted(again.part("unet")).items():
            x = torch.ones(3, layer.get_base_layer().in_features)
            with torch.no_grad():
                torch.testing.assert_close(layer.eval()(x), live[path].eval()(x))


def test_a_folder_of_early_peft_s(sd15_folder, tmp_path, source):
    tensors = {f"base_model.model.{path}": layer for path, layer in live_state(source)["unet"].items()}
    weights = {f"{name}.lora_A.weight": layer.down for name, layer in tensors.items()}
    torch.save(
        weights | {f"{name}.lora_B.weight": layer.up for name, layer in tensors.items()}, tmp_path / "adapter_model.bin"
    )
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 3, "r": 4, "alpha_pattern": {"to_k": 1.5}}')
    again = resumed(sd15_folder, tmp_path, parts={"denoiser": {}})
    assert_same_layers(again, source)


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_a_bin_that_could_run_code_is_refused(sd15_folder, tmp_path, source):
    torch.save(kohya(source) | {"more": Evil()}, tmp_path / "evil.bin")
    refused(sd15_folder, tmp_path / "evil.bin", r"from_file=.*evil\.bin: not a whole file of tensors alone")


def test_a_bin_of_more_than_tensors_one_cut_off_and_one_that_fills_the_memory_are_refused(
    sd15_folder, tmp_path, source
):
    file, tensors = tmp_path / "x.bin", kohya(source)
    torch.save(tensors | {"step": 3, "lost": torch.eye(3).to_sparse()}, file)
    refused(sd15_folder, file, r"from_file=.*holds more than plain tensors by name: step, lost")
    torch.save([], file)
    refused(sd15_folder, file, "holds no tensors by name")
    torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    refused(sd15_folder, file, "not a whole file of tensors alone")
    key = next(key for key in tensors if key.endswith("attn2_to_v.lora_down.weight"))
    torch.save(tensors | {key: torch.zeros(1).expand(4, 10**9)}, file)
    refused(sd15_folder, file, r"says it holds 160\d{8} bytes, and the file has \d+")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json is not JSON"),
        ("[" * 10**5, "adapter_config.json is not JSON"),
        ("[1]", "adapter_config.json holds no settings by name"),
        ('{"lora_alpha": "x"}', "alpha of .* is x, not a finite number"),
        ('{"lora_alpha": NaN}', "alpha of .* is nan, not a finite number"),
        ('{"lora_alpha": -1}', "alpha of .* is -1, not above 0"),
        ('{"lora_alpha": 3, "alpha_pattern": [1]}', "alpha_pattern is none that can be read"),
        ('{"lora_alpha": 3, "alpha_pattern": {"(": 1}}', "alpha_pattern is none that can be read"),
        (
            '{"lora_alpha": 3, "alpha_pattern": {"(.|.|.)*[A-Z]": 1}}',
            "alpha_pattern is none that can be read .*timed out",
        ),
    ],
)
def test_broken_settings_of_peft_are_refused(sd15_folder, tmp_path, source, config, message, monkeypatch):
    monkeypatch.setattr("otl.methods.continuing.PATTERN_SECONDS", 0.1)
    layers_of_unet = live_state(source)["unet"].items()
    weights = {f"base_model.model.{path}{end}": x for path, layer in layers_of_unet for end, x in sides(layer)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    refused(sd15_folder, tmp_path, rf"method\.from_file=.*{message}", parts={"denoiser": {}})


def sides(layer):
    return zip(PEFT, (layer.down, layer.up))


def test_a_layer_in_two_spellings_is_refused(sd15_folder, tmp_path, source):
    path, layer = next(iter(live_state(source)["unet"].items()))
    again = {f"unet.{path}{end}": 2 * tensor for end, tensor in sides(layer)}
    save_file(kohya(source) | again, tmp_path / "twice.safetensors")
    refused(sd15_folder, tmp_path / "twice.safetensors", r"from_file=.*lora_A\.weight stands in it twice")


@pytest.mark.parametrize("arguments", ["{", "[1]"])
def test_a_dora_whose_header_does_not_tell_its_lengths_is_refused(sd15_folder, tmp_path, arguments):
    source = trained(StableDiffusion, sd15_folder, Dora(rank=2, targets=["attn2.to_k"]))
    tensors, header = read(source.export(tmp_path / "final"))
    save_file(tensors, tmp_path / "odd.safetensors", header | {"ss_network_args": arguments})
    refused(
        sd15_folder, tmp_path / "odd.safetensors", "from_file=.*ss_network_args", method=Dora, parts={"denoiser": {}}
    )


@pytest.mark.parametrize("spelling", ["diffusers", "sgm"])
@pytest.mark.parametrize(
    "method",
    [
        lambda **options: Lora(**{"rank": 2, "alpha": 1.0} | options),
        lambda **options: Dora(**{"rank": 2, "alpha": 1.0} | options),
        lambda **options: Loha(**{"rank": 2, "alpha": 1.0} | options),
        lambda **options: Lokr(**{"rank": 2, "alpha": 1.0, "factor": 4} | options),
        lambda **options: Oft(**{"block_size": 4} | options),
    ],
)
def test_sdxl_in_both_spellings_of_the_unet(sdxl_folder, tmp_path, method, spelling):
    parts = {"denoiser": {}, "text_encoder": {}, "text_encoder_2": {}}
    source = trained(StableDiffusionXL, sdxl_folder, method(parts=parts))
    source.output_options = Output(dtype="fp32")
    tensors, header = read(source.export(tmp_path / "final"))
    if spelling == "diffusers":
        names = {f"lora_unet_{under(new)}": f"lora_unet_{under(path)}" for path, new in sgm(source).items()}
        tensors = {key.replace(*stem_of(key, names)): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "other.safetensors", header)
    again = resumed(
        sdxl_folder,
        tmp_path / "other.safetensors",
        family=StableDiffusionXL,
        method=lambda **o: method(**o),
        parts=parts,
    )
    assert_same_layers(source, again)


def stem_of(key, names):
    stem = key.partition(".")[0]
    return stem, names.get(stem, stem)


def test_lokr_keeps_factors_that_its_settings_would_not_make(sd15_folder, tmp_path):
    """As LyCORIS makes them with factor 8, and one layer with both factors whole, whose alpha means nothing."""
    source = trained(StableDiffusion, sd15_folder, Lokr(rank=2, alpha=1.0, factor=8, ranks={"to_q": 100}))
    file = source.export(tmp_path / "final")
    again = resumed(sd15_folder, file, method=Lokr, parts={"denoiser": {}}, rank=1, decompose_both=True)
    for path, layer in live_state(again)["unet"].items():
        assert (layer.w2 is not None) == (path.endswith("to_q") or live_state(source)["unet"][path].w2 is not None)
    source.output_options = again.output_options = Output(dtype="fp32")
    first, second = load_file(source.export(tmp_path / "a")), load_file(again.export(tmp_path / "b"))
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-3, atol=1e-4, msg=key)


def test_a_lora_goes_on_as_a_dora_without_a_jump(sd15_folder, tmp_path, source):
    source.output_options = Output(dtype="fp32")
    again = resumed(sd15_folder, source.export(tmp_path / "final"), method=Dora)
    assert_same_layers(source, again)
    assert all(layer.magnitude is not None for layer in live_state(again)["unet"].values())


def test_ranks_and_alphas_are_the_file_s_and_new_layers_have_the_settings(sd15_folder, tmp_path, source, caplog):
    file = source.export(tmp_path / "final")
    with caplog.at_level("INFO", "otl"):
        again = resumed(sd15_folder, file, targets="full", rank=5, alpha=2.5)
    old, new = live_state(source), live_state(again)
    fresh = 0
    for part, of_part in new.items():
        for path, layer in of_part.items():
            if path in old[part]:
                assert (len(layer.down), layer.alpha) == (len(old[part][path].down), old[part][path].alpha)
            else:
                assert (len(layer.down), layer.alpha) == (5, 2.5)
                assert not layer.up.any()
                fresh += 1
    known = sum(map(len, old.values()))
    assert f"{known} layers go on from {file}, with its ranks and alphas; {fresh} others start anew" in caplog.text


def test_exactly_the_layers_of_the_file(sd15_folder, tmp_path):
    source = trained(StableDiffusion, sd15_folder, Lora(targets=["attn1", "conv_out"]))
    again = resumed(sd15_folder, source.export(tmp_path / "final"), parts={"denoiser": {}})
    assert set(adapted(again.part("unet"))) == set(adapted(source.part("unet")))


def refused(folder, file, message, **options):
    with pytest.raises(SettingsError, match=message):
        resumed(folder, file, **options)


def test_a_file_that_adapts_more_than_is_trained(sd15_folder, tmp_path, source):
    file = source.export(tmp_path / "final")
    one = {"denoiser": {}}
    refused(sd15_folder, file, r"also adapts text_encoder: add method\.parts\.text_encoder=\{\}", parts=one)
    refused(
        sd15_folder,
        file,
        r"method\.targets=attn-only leaves out \d+ layers that method\.from_file=.*final.safetensors adapts: .*proj.*"
        r"targets=file",
        targets="attn-only",
    )
    unet = trained(StableDiffusion, sd15_folder, Lora()).export(tmp_path / "unet")
    refused(sd15_folder, unet, r"has nothing for text_encoder: set method\.parts\.text_encoder=null")


def test_keys_that_belong_to_no_layer_are_listed(sd15_folder, tmp_path, source):
    tensors = kohya(source) | {
        "lora_unet_up_blocks_9_conv.lora_up.weight": torch.zeros(1),
        "v_pred": torch.zeros(1),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    refused(
        sd15_folder,
        tmp_path / "lora.safetensors",
        r"from_file=.*: not a LoRA of this model: 2 keys fit no module: lora_unet_up_blocks_9_conv\.\S+, v_pred",
    )


def test_layers_of_another_size_are_listed(sd15_folder, tmp_path, source):
    tensors = kohya(source)
    key = next(key for key in tensors if key.endswith("attn2_to_v.lora_down.weight"))
    tensors[key] = torch.zeros(4, 48)
    save_file(tensors, tmp_path / "lora.safetensors")
    refused(
        sd15_folder,
        tmp_path / "lora.safetensors",
        r"trained on another model: 1 of its layers have other sizes: unet\..*attn2\.to_v \(\d+x48, not \d+x32\)",
    )


def test_magnitudes_of_inputs_are_refused(sd15_folder, tmp_path):
    source = trained(StableDiffusion, sd15_folder, Dora(rank=2, targets=["attn2.to_k"]))
    source.output_options = Output(dtype="fp32")
    tensors = load_file(source.export(tmp_path / "final"))
    for key in [key for key in tensors if key.endswith("dora_scale")]:
        tensors[key] = torch.ones(1, 32)
    save_file(tensors, tmp_path / "input.safetensors")
    refused(
        sd15_folder,
        tmp_path / "input.safetensors",
        r"dora_scale \(1, 32\) is one for each input",
        method=Dora,
        parts={"denoiser": {}},
    )
    refused(
        sd15_folder,
        tmp_path / "final.safetensors",
        r"holds a DoRA, not a LoRA: use method=dora",
        parts={"denoiser": {}},
    )


def test_a_rotation_longer_than_kohya_s_alpha_allows_is_cut(sd15_folder, tmp_path):
    source = trained(StableDiffusion, sd15_folder, Oft(block_size=8, targets=["attn1.to_q"]))
    source.output_options = Output(dtype="fp32")
    tensors = load_file(source.export(tmp_path / "final"))
    for key in [key for key in tensors if key.endswith("alpha")]:
        tensors[key] = torch.tensor(0.001)
    tensors = {key.replace("lora_unet_", "oft_unet_"): tensor for key, tensor in tensors.items()}  # kohya's own module
    save_file(tensors, tmp_path / "short.safetensors")
    again = resumed(sd15_folder, tmp_path / "short.safetensors", method=Oft, parts={"denoiser": {}})
    for path, layer in live_state(again)["unet"].items():
        q = layer.blocks - layer.blocks.mT
        before = live_state(source)["unet"][path].blocks
        assert q.norm().item() == pytest.approx(0.001 * layer.blocks.shape[0] * 8, rel=1e-4)
        torch.testing.assert_close(q / q.norm(), (before - before.mT) / (before - before.mT).norm())


def test_a_tucker_lora_and_a_torn_file_are_refused(sd15_folder, tmp_path, source):
    tensors = kohya(source)
    stem = next(key for key in tensors if key.endswith(".alpha")).removesuffix(".alpha")
    save_file(tensors | {f"{stem}.lora_mid.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "mid.safetensors")
    refused(sd15_folder, tmp_path / "mid.safetensors", rf"1 keys fit no module: {stem}\.lora_mid\.weight")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "mid.safetensors").read_bytes()[:-10])
    refused(sd15_folder, tmp_path / "torn.safetensors", r"method\.from_file=.*torn.*not a whole safetensors file")


def test_no_two_layers_share_a_name(sdxl_folder):
    from otl.methods.continuing import owners

    module = module_of(StableDiffusionXL, sdxl_folder)
    module.configure_model()
    found = owners(module)
    names = sgm_unet_names(dict(module.part("unet").config), layers(module.part("unet")))
    for path, original in names.items():
        assert found[f"lora_unet_{under(path)}"] == found[f"lora_unet_{under(original)}"] == ("unet", path)
    assert json.dumps(sorted(set(found.values()))).count('"unet"') == len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_knows_the_file_s_layers_without_weights(sd15_folder, tmp_path, kind):
    source = trained(StableDiffusion, sd15_folder, KINDS[kind](targets="full"))
    skeleton = module_of(StableDiffusion, sd15_folder)
    skeleton.method = KINDS[kind](targets="file", from_file=str(source.export(tmp_path / "final")))
    skeleton.build_skeleton()
    shapes = [{name: p.shape for name, p in each.trained_parameters().items()} for each in (source, skeleton)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in skeleton.trained_parameters().values()} == {"meta"}


@pytest.mark.parametrize("style", list(LoraFormat))
def test_a_file_in_half_precision_goes_on_in_fp32(sd15_folder, tmp_path, source, style):
    source.output_options = Output(format=style, dtype="fp16")
    again = resumed(sd15_folder, source.export(tmp_path / "final"))
    assert {parameter.dtype for parameter in again.trained_parameters().values()} == {torch.float32}
