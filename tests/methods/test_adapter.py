"""All kinds of adapters: what the file says is what the live layers do, whatever goes on from it says it too."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from otl.config import LoraFormat, Output, SettingsError
from otl.formats.lora import kohya_key
from otl.methods.adapter import Strength
from otl.methods.injected import adapted, live_state
from otl.methods.loha import Loha
from otl.methods.lokr import Lokr
from otl.methods.lora import Dora, Lora
from otl.methods.oft import Oft
from otl.methods.targets import layers
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from tests.methods.kinds import KINDS, assert_same_layers, module_of, outputs, published, train, trained

PARTS = {"denoiser": {}, "text_encoder": {}}


def layer_of(tensors, stem):
    """The tensors of one layer, by the end of their keys."""
    return {key.removeprefix(f"{stem}."): tensor for key, tensor in tensors.items() if key.startswith(f"{stem}.")}


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_does_what_the_file_says_by_the_published_formula(sd15_folder, tmp_path, kind):
    module = trained(StableDiffusion, sd15_folder, KINDS[kind](targets="full", parts=PARTS))
    module.output_options = Output(dtype="fp32")
    tensors = load_file(module.export(tmp_path / "final"))
    unread = set(tensors)
    for part in ("unet", "text_encoder"):
        for path, layer in adapted(module.part(part)).items():
            portable = f"text_model.{path}" if part == "text_encoder" else path
            stem = kohya_key(module.kohya_prefixes[part], portable)
            own = layer_of(tensors, stem)
            unread -= {f"{stem}.{end}" for end in own}
            reader = kind.removeprefix("dora_") if kind.startswith("dora_") else "comfyui"
            delta = published(own, layer.get_base_weight(), reader=reader).float()
            x, expected = outputs(layer, delta)
            with torch.no_grad():
                change = layer.eval()(x) - layer.get_base_layer()(x)
            assert expected.abs().max() > 1e-4, path
            torch.testing.assert_close(change, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item() + 1e-6)
    assert not unread


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(sd15_folder, kind):
    module = module_of(StableDiffusion, sd15_folder)
    module.method = KINDS[kind](targets="full", parts=PARTS)
    module.configure_model()
    for part in ("unet", "text_encoder"):
        for layer in adapted(module.part(part)).values():
            x, _ = outputs(layer)
            with torch.no_grad():
                torch.testing.assert_close(layer.eval()(x), layer.get_base_layer()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_makes_chance_of_training_and_of_nothing_else(sd15_folder, kind):
    def changing(dropout, *, training):
        """Whether every layer makes something else of the same inputs each time."""
        module = trained(StableDiffusion, sd15_folder, KINDS[kind](targets=["attn2.to_k"], dropout=dropout))
        torch.manual_seed(0)
        layers = [(layer.train(training), outputs(layer)[0]) for layer in adapted(module.part("unet")).values()]
        with torch.no_grad():
            return [any(not torch.equal(layer(x), layer(x)) for _ in range(9)) for layer, x in layers]

    assert all(changing(0.5, training=True))
    assert not any(changing(0.5, training=False) + changing(0.0, training=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_a_function_of_the_seed(sd15_folder, kind):
    def start(seed):
        module = module_of(StableDiffusion, sd15_folder)
        module.seed, module.method = seed, KINDS[kind]()
        torch.manual_seed(seed + 99)
        module.configure_model()
        return torch.cat([p.flatten() for p in module.trained_parameters().values()])

    assert torch.equal(start(0), start(0))
    assert torch.equal(start(0), start(1)) == (kind == "oft")  # which starts with nothing drawn


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_a_gradient_once_it_has_moved(sd15_folder, kind):
    module = trained(StableDiffusion, sd15_folder, KINDS[kind](targets="full"))
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    module.pipeline.unet(torch.ones(2, 4, 16, 16), torch.tensor([10, 900]), hidden).sample.square().mean().backward()
    parameters = module.trained_parameters()
    assert [name for name, p in parameters.items() if p.grad is None or not p.grad.any()] == []
    assert {id(p) for group in module.groups for p in group.params} == {id(p) for p in parameters.values()}
    assert all(p.dtype == torch.float32 for p in parameters.values())


WRITTEN = [(kind, style) for kind in KINDS for style in LoraFormat if (kind, style) != ("oft", LoraFormat.peft)]


@pytest.mark.parametrize(("kind", "style"), WRITTEN)  # PEFT's OFT is another, see test_oft_in_peft_s_format_is_refused
def test_going_on_from_its_own_file_is_going_on(sd15_folder, tmp_path, kind, style):
    module = trained(StableDiffusion, sd15_folder, KINDS[kind](targets="full", parts=PARTS))
    module.output_options = Output(format=style, dtype="fp32")
    file = module.export(tmp_path / "final")
    again = module_of(StableDiffusion, sd15_folder)
    again.method = KINDS[kind](targets="full", parts=PARTS, from_file=str(file))
    again.configure_model()
    assert_same_layers(module, again)
    again.output_options = Output(format=style, dtype="fp32")
    first, second = load_file(file), load_file(again.export(tmp_path / "again"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_on_from_a_file(sd15_folder, tmp_path, kind):
    module = trained(StableDiffusion, sd15_folder, KINDS[kind]())
    again = trained(StableDiffusion, sd15_folder, KINDS[kind](from_file=str(module.export(tmp_path / "final"))), seed=5)
    assert {id(p) for group in again.groups for p in group.params} == {
        id(p) for p in again.trained_parameters().values()
    }
    assert again.export(tmp_path / "again").is_file()


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "oft"])
def test_a_file_of_another_kind_names_its_method(sd15_folder, tmp_path, kind):
    file = trained(StableDiffusion, sd15_folder, KINDS[kind]()).export(tmp_path / "final")
    module = module_of(StableDiffusion, sd15_folder)
    module.method = (Lora if kind != "lora" else Loha)(from_file=str(file))
    with pytest.raises(SettingsError, match=rf"(?i)holds a {kind}, not a \w+: use method={kind}"):
        module.configure_model()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_over_bf16_stay_fp32_and_start_as_nothing(sd15_folder, kind):
    module = StableDiffusion(str(sd15_folder), dtype="bf16")
    module.method = KINDS[kind](targets="full")
    module.configure_model()
    assert {p.dtype for p in module.trained_parameters().values()} == {torch.float32}
    worst = 0.0
    for layer in adapted(module.part("unet")).values():
        x, _ = outputs(layer)
        with torch.no_grad():
            plain = layer.get_base_layer()(x.bfloat16()).float()
            worst = max(worst, ((layer.eval()(x.bfloat16()).float() - plain).norm() / plain.norm()).item())
    assert worst < 2e-3  # a step of bf16 here and there; lengths measured in bf16 would be 4e-3 off everywhere


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_a_layer_puts_out_what_its_frozen_one_does(sd15_folder, kind):
    """Else all that comes behind would be kept in fp32."""
    module = trained(StableDiffusion, sd15_folder, KINDS[kind]())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for layer in adapted(module.part("unet")).values():
            x, _ = outputs(layer)
            assert layer(x).dtype == layer.get_base_layer()(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("reader", "other"), [("comfyui", "lycoris"), ("lycoris", "comfyui")])
def test_a_dora_for_one_reader_is_another_to_the_other(sd15_folder, tmp_path, reader, other):
    """The two divide by other lengths; each is right about files that are meant for it alone."""
    module = trained(StableDiffusion, sd15_folder, Dora(rank=4, alpha=4.0, reader=reader, targets=["attn2.to_k"]))
    module.output_options = Output(dtype="fp32")
    file = module.export(tmp_path / "final")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        frozen = json.loads(opened.metadata()["ss_network_args"]).get("dora_lengths") == "frozen"
    assert frozen == (reader == "comfyui")
    for path, layer in adapted(module.part("unet")).items():
        weight, own = layer.get_base_weight(), layer_of(tensors, f"lora_unet_{path.replace('.', '_')}")
        right, wrong = (published(own, weight, reader=each) for each in (reader, other))
        assert (right - wrong).norm() > 0.01 * right.norm()


def test_exclusions_take_out_exactly_what_they_match(sd15_folder):
    def paths(**options):
        module = module_of(StableDiffusion, sd15_folder)
        module.method = Lora(parts=PARTS, **options)
        module.configure_model()
        return {part: set(adapted(module.part(part))) for part in module.trained}

    every, some = paths(), paths(exclude=["attn2", r"ff\.net\.0"])
    assert some["unet"] == {path for path in every["unet"] if "attn2" not in path and "ff.net.0" not in path}
    assert some["unet"] and some["unet"] < every["unet"]
    assert some["text_encoder"] == every["text_encoder"]
    assert paths(exclude="attn2")["unet"] == {path for path in every["unet"] if "attn2" not in path}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["attn7"]}, r"method\.exclude: 'attn7' matches no layer that would be trained"),
        ({"exclude": [""]}, r"method\.exclude leaves no layer of unet: set method\.parts\.unet=null"),
        ({"exclude": ["("]}, r"method\.exclude: '\(' is no regular expression"),
        ({"ranks": {"attn7": 2}}, r"method\.ranks: 'attn7' matches no layer that would be trained"),
        (
            {"ranks": {"attn": 2, "attn1": 4}},
            r"method\.ranks: 'attn1' matches no layer.*those of a pattern before",
        ),
        ({"parts": {"vae": {}}}, r"method\.parts\.vae: this method does not train vae, but unet, text_encoder"),
        ({"parts": {"denoiser": {}, "unet": {}}}, r"method\.parts\.unet: unet is named twice"),
    ],
)
def test_settings_that_mean_nothing_are_refused(sd15_folder, options, message):
    module = module_of(StableDiffusion, sd15_folder)
    module.method = Lora(**options)
    with pytest.raises(SettingsError, match=message):
        module.configure_model()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(ranks={"attn1": 0}), r"method\.ranks\.attn1=0: must be a whole number"),
        (lambda: Lora(ranks={"attn1": 2.5}), r"method\.ranks\.attn1=2\.5: must be a whole number"),
        (lambda: Lora(targets="file"), r"method\.targets=file: means the layers of method\.from_file"),
        (lambda: Lora(parts={"denoiser": 5}), r"method\.parts\.denoiser=5: give its options"),
        (lambda: Lora(parts={"denoiser": {"rank": 0}}), r"method\.parts\.denoiser\.rank=0: must be a whole number"),
        (lambda: Lora(parts={"denoiser": {"alpha": 0}}), r"method\.parts\.denoiser\.alpha=0: must be above 0"),
        (lambda: Lora(parts={"denoiser": {"lr": -1}}), r"method\.parts\.denoiser\.lr=-1: must be at least 0"),
        (lambda: Lora(parts={"denoiser": {"lr": "fast"}}), r"method\.parts\.denoiser\.lr=fast: must be a number"),
        (
            lambda: Lora(parts={"denoiser": {"stop_after": "0.5"}}),
            r"stop_after=0\.5: must be a number, or whole epochs",
        ),
        (
            lambda: Lora(parts={"denoiser": {"size": 1}}),
            r"size=1: no such setting; a part has lr, rank, alpha",
        ),
        (lambda: Oft(parts={"denoiser": {"rank": 4}}), r"rank=4: no such setting; a part has lr, stop_after"),
        (lambda: Oft(block_size=1), r"method\.block_size: must be at least 2"),
        (lambda: Lokr(factor=1), r"method\.factor=1: must be at least 2, or -1"),
        (lambda: Lora(from_file="no.safetensors"), r"method\.from_file=no\.safetensors: there is no such file"),
        (lambda: Dora(reader="forge"), r"method\.reader=forge: must be comfyui or lycoris"),
        (lambda: Loha(rank=0), r"method\.rank=0: must be at least 1"),
        (lambda: Oft(block_size=0), r"method\.block_size=0: must be at least 1"),
    ],
)
def test_impossible_values_are_refused_at_once(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


def strengths(module):
    """part -> path -> rank and alpha of the live layer."""
    return {
        part: {path: (layer.down.shape[0], layer.alpha) for path, layer in of_part.items()}
        for part, of_part in live_state(module).items()
    }


def test_rank_patterns_and_the_ranks_of_parts_keep_the_strength(sd15_folder):
    module = module_of(StableDiffusion, sd15_folder)
    module.method = Lora(
        rank=8,
        alpha=4.0,
        ranks={"to_q$": 2, "attn1": 3},
        parts={"denoiser": {}, "text_encoder": {"rank": 4, "lr": 1e-5, "stop_after": 0.5}},
    )
    module.configure_model()
    found = strengths(module)
    for path, (rank, alpha) in found["unet"].items():
        assert rank == (2 if path.endswith("to_q") else 3 if "attn1" in path else 8)
        assert alpha == pytest.approx(rank / 2)
    assert set(found["text_encoder"].values()) == {(4, 2.0)}
    assert [(group.name, group.lr, group.stop_after) for group in module.groups] == [
        ("unet", None, None),
        ("text_encoder", 1e-5, 0.5),
    ]


def test_a_part_has_its_own_alpha(sd15_folder):
    module = module_of(StableDiffusion, sd15_folder)
    module.method = Lora(rank=8, alpha=4.0, parts={"denoiser": {}, "text_encoder": {"rank": 4, "alpha": 1.0}})
    module.configure_model()
    assert set(strengths(module)["unet"].values()) == {(8, 4.0)}
    assert set(strengths(module)["text_encoder"].values()) == {(4, 1.0)}


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_rank_patterns_reach_the_other_kinds(sd15_folder, kind):
    module = module_of(StableDiffusion, sd15_folder)
    module.method = KINDS[kind](rank=2, alpha=2.0, ranks={"ff": 1})
    module.configure_model()
    for path, layer in adapted(module.part("unet")).items():
        rank = 1 if "ff" in path else 2
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == 1.0


def test_block_sizes_divide_the_outputs(sd15_folder):
    module = module_of(StableDiffusion, sd15_folder)
    module.method = Oft(block_size=24, targets="full", block_sizes={"attn": 8})
    module.configure_model()
    for path, layer in live_state(module)["unet"].items():
        outputs = module.part("unet").get_submodule(path).get_base_layer().weight.shape[0]
        assert layer.blocks.shape[0] * layer.blocks.shape[1] == outputs
        assert layer.blocks.shape[1] == (8 if "attn" in path else max(n for n in range(1, 25) if outputs % n == 0))


def test_a_rotation_keeps_the_length_of_every_input_s_weights(sd15_folder):
    module = trained(StableDiffusion, sd15_folder, Oft(block_size=8, targets="full"))
    for layer in adapted(module.part("unet")).values():
        weight = layer.get_base_weight()
        turned = weight + published({"oft_blocks": layer.oft_blocks["default"], "alpha": torch.tensor(0)}, weight)
        torch.testing.assert_close(turned.norm(dim=0), weight.double().norm(dim=0), rtol=1e-6, atol=1e-6)


def test_oft_in_peft_s_format_is_refused(sd15_folder):
    module = module_of(StableDiffusion, sd15_folder)
    module.method, module.output_options = Oft(), Output(format=LoraFormat.peft)
    with pytest.raises(SettingsError, match=r"output\.format=peft: PEFT's OFT rotates the inputs"):
        module.configure_model()


def test_depthwise_convolutions_take_no_adapter():
    part = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.LayerNorm(4))
    assert layers(part) == ["1", "2"]


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        ("lora", "networks.lora", {}),
        ("dora", "lycoris.kohya", {"algo": "lora", "dora_wd": "True", "conv_dim": "4", "conv_alpha": "3"}),
        ("loha_tucker", "lycoris.kohya", {"algo": "loha", "use_tucker": "True", "conv_dim": "4", "conv_alpha": "3"}),
        ("lokr", "lycoris.kohya", {"algo": "lokr", "factor": "4", "decompose_both": "False", "conv_alpha": "3"}),
        ("oft", "lycoris.kohya", {"algo": "diag-oft"}),
    ],
)
def test_the_header_names_the_network_that_trains_such_files(sd15_folder, tmp_path, kind, module, arguments):
    with safe_open(trained(StableDiffusion, sd15_folder, KINDS[kind]()).export(tmp_path / "final"), "pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == module
    assert arguments.items() <= json.loads(header["ss_network_args"]).items()
    name = {"dora": "DoRA", "loha_tucker": "LoHa", "lokr": "LoKr", "oft": "OFT", "lora": "LoRA"}[kind]
    assert header["modelspec.description"].startswith(name)


def test_both_text_encoders_of_sdxl_have_their_own_prefix(sdxl_folder, tmp_path):
    parts = {"denoiser": {}, "text_encoder": {"rank": 1}, "text_encoder_2": {}}
    module = trained(StableDiffusionXL, sdxl_folder, Loha(rank=2, alpha=2.0, parts=parts))
    tensors = load_file(module.export(tmp_path / "final"))
    assert tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_b"].shape[0] == 1
    assert tensors["lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_b"].shape[0] == 2
    assert any(key.startswith("lora_unet_input_blocks_") for key in tensors)


def test_other_trained_weights_stay_trained_and_out_of_the_file(sd15_folder, tmp_path):
    module = module_of(StableDiffusion, sd15_folder)
    module.method = Lora(rank=2)

    class Both(Lora):
        def attach(self, module):
            module.part("text_encoder").embeddings.token_embedding.weight.requires_grad_(True)
            module.part("unet").conv_in.weight.requires_grad_(True)
            return super().attach(module)

    module.method = Both(rank=2)
    module.configure_model()
    assert module.part("unet").conv_in.weight.requires_grad
    assert "text_encoder" in module.trained
    assert set(live_state(module)) == {"unet"}
    assert all("lora_" in key or key.endswith("alpha") for key in load_file(module.export(tmp_path / "final")))
    assert len(module.groups[0].params) == 2 * len(live_state(module)["unet"])


def test_the_adapter_of_a_meta_skeleton_has_the_parameters_of_the_real_one(sd15_folder):
    for kind, make in KINDS.items():
        real, skeleton = module_of(StableDiffusion, sd15_folder), module_of(StableDiffusion, sd15_folder)
        real.method, skeleton.method = make(targets="full"), make(targets="full")
        real.configure_model()
        skeleton.build_skeleton()
        shapes = [{n: p.shape for n, p in each.trained_parameters().items()} for each in (real, skeleton)]
        assert shapes[0] == shapes[1], kind
        assert {p.device.type for p in skeleton.trained_parameters().values()} == {"meta"}
        unet = skeleton.part("unet").to("meta")
        noisy, hidden = torch.zeros(2, 4, 16, 16, device="meta"), torch.zeros(2, 5, 32, device="meta")
        t = torch.zeros(2, dtype=torch.long, device="meta")
        unet(noisy, t, encoder_hidden_states=hidden).sample.mean().backward()  # as a plan measures it


def test_training_moves_what_the_file_holds(sd15_folder, tmp_path):
    module = trained(StableDiffusion, sd15_folder, Lokr(rank=2, alpha=2.0))
    before = load_file(module.export(tmp_path / "before"))
    train(module, seed=7)
    after = load_file(module.export(tmp_path / "after"))
    assert all(not torch.equal(before[key], after[key]) for key in before if not key.endswith("alpha"))


WIDTHS = [  # layer, method, the numbers of rows and columns (and of a Tucker kernel) that its products have
    (nn.Linear(6, 4), Lora(rank=9), 4),
    (nn.Conv2d(6, 80, 3), Lora(rank=9), 54),  # 6 * 3 * 3 columns
    (nn.Conv2d(6, 80, 3), Dora(rank=9), 54),
    (nn.Linear(6, 4), Loha(rank=9), 4),  # of each of both factors, whose product can be anything then
    (nn.Conv2d(6, 80, 3), Loha(rank=9), 54),
    (nn.Conv2d(6, 80, 3), Loha(rank=9, tucker=True), 54),  # 80 outputs by 6 * 9; inputs by 80 * 9: min(6, 720)
    (nn.Conv2d(6, 40, 3), Loha(rank=9, tucker=True), 40),
    (nn.Linear(64, 16), Lokr(rank=7, factor=4), 4),  # w2 is 4 x 16: low-rank below a rank of 8
    (nn.Linear(64, 16), Lokr(rank=8, factor=4), None),  # and whole from there on
    (nn.Linear(900, 4), Lokr(rank=8, factor=2, decompose_both=True), 2),  # w1 2 x 2 whole, w2 2 x 450
    (nn.Linear(2500, 2500), Lokr(rank=8, decompose_both=True), 50),  # w1 and w2 50 x 50
    (nn.Conv2d(64, 16, 3), Lokr(rank=7, factor=4), 4),  # w2 4 x 16 * 9
    (nn.Conv2d(64, 16, 3), Lokr(rank=7, factor=4, tucker=True), 16),  # 16 by 4 * 9
]


@pytest.mark.parametrize(("layer", "method", "width"), WIDTHS)
def test_a_layers_width_is_that_of_the_matrices_that_peft_makes_for_it(layer, method, width):
    part = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    method.inject(part, {"layer": Strength(method.rank, method.alpha)}, seed=0)
    assert method.width(adapted(part)["layer"]) == width


@pytest.mark.parametrize(("rank", "said"), [(32, []), (33, ["method.rank"])])
def test_a_rank_above_the_width_of_a_layer_is_said(sd15_folder, rank, said):
    """The tiny UNet's attention is 32 and 64 wide."""
    module = module_of(StableDiffusion, sd15_folder, Loha(rank=rank, targets=["to_q"]))
    module.build_skeleton()
    assert [problem.key for problem in module.method.advice(module)] == said


def test_blocks_that_are_smaller_than_asked_for_are_said(sd15_folder):
    """The tiny UNet's attention puts out 32 and 64 numbers: 16 divides both, 24 neither."""
    for size, said in ((16, []), (24, ["method.block_size"])):
        module = module_of(StableDiffusion, sd15_folder, Oft(block_size=size, targets=["to_q"]))
        module.build_skeleton()
        found = list(module.method.advice(module))
        assert [(problem.key, problem.fatal) for problem in found] == [(key, False) for key in said]
        assert all("blocks of 16, not 24, for " in detail for problem in found for detail in problem.details)
