"""Embeddings: what trains, what the tokens become, and what other programs make of the file."""

import math

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from otl.config import LoraFormat, Output, SettingsError
from otl.methods.embedding import Embedding
from otl.methods.finetune import Finetune
from otl.methods.lora import Lora
from otl.methods.rows import pooling
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.types import Size
from tests.methods.words import BUILDERS, US, batch_of, build, taught, train
from tests.tiny_priors import FAMILIES

KEYS = {  # ComfyUI's names of the text encoders; kohya's where there is one CLIP
    "sd15": {"emb_params"},
    "sdxl": {"clip_l", "clip_g"},
    "pixart_alpha": {"t5xxl"},
    "wuerstchen": {"clip_g"},
    "stable_cascade": {"clip_g"},
}
WIDTHS = {"sd15": 768, "sdxl": 768 + 1280, "pixart_alpha": 4096, "wuerstchen": 1280, "stable_cascade": 1280}
CAT = {"cat": {"vectors": 3, "init": "cat"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> a tiny checkpoint of that family."""
    return {name: build(name, tmp_path_factory.mktemp(name)) for name in BUILDERS}


@pytest.fixture(params=BUILDERS)
def family(request):
    return request.param


def weights(module):
    """All parts, as other programs know them."""
    with module.embeddings.put_away(module):
        return {
            f"{part}.{name}": tensor.clone()
            for part in module.part_names
            if part not in module.released
            for name, tensor in module.part(part).state_dict().items()
        }


def vectors(module):
    return {name: parameter.detach().clone() for name, parameter in module.trained_parameters().items()}


# What trains


@pytest.mark.parametrize("output", [False, True])
def test_nothing_but_the_new_rows_changes_under_weight_decay(folders, family, output):
    module = taught(family, folders[family], Embedding(embeddings={"cat": {"vectors": 2, "output": output}}))
    before, rows = weights(module), vectors(module)
    train(module, "a <cat> on grass")
    after = weights(module)
    assert before.keys() == after.keys()
    assert len(before) > 50
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(rows) == len(module.text_encoders)
    assert all((rows[name] != moved).any(dim=1).all() for name, moved in vectors(module).items())


def test_a_gradient_reaches_every_vector_and_nothing_else(folders, family):
    module = taught(family, folders[family], Embedding(embeddings=CAT | {"dog": {"output": True}}))
    module.losses(batch_of(module, "a <cat> and a <dog>"), u=US, stream="noise").mean().backward()
    own = {id(parameter) for group in module.groups for parameter in group.params}
    for part in module.part_names:
        for name, parameter in module.part(part).named_parameters():
            if id(parameter) in own:
                assert parameter.grad.abs().sum(dim=1).min() > 0, name
            else:
                assert parameter.grad is None, name
    encoders = module.text_encoders
    expected = [f"embedding.{name}.{encoder}" for name in ("cat", "dog") for encoder in encoders]
    assert [group.name for group in module.groups] == expected


def test_a_text_encoder_that_only_lends_its_table_gets_no_gradient_for_output_vectors(folders):
    module = taught("sd15", folders["sd15"], Embedding(embeddings={"cat": {"output": True}}))
    hidden = module.embeddings.read(module, ["a <cat>"])["hidden"]
    assert not hidden.requires_grad
    assert module.encode_prompt(["a <cat>"])["hidden"].requires_grad


def test_the_vocabulary_stays_beside_a_lora_on_the_same_encoder(folders):
    method = Lora(rank=2, targets="full", parts={"denoiser": {}, "text_encoder": {}}, embeddings=CAT)
    module = taught("sd15", folders["sd15"], method)
    before, rows = weights(module), vectors(module)
    train(module, "a <cat>")
    after = weights(module)
    frozen = [name for name in before if "lora_" not in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any("token_embedding.weight" in name for name in frozen)
    trained = vectors(module)
    assert any("lora_" in name and "text_encoder" in name for name in trained)
    changed = {name for name in rows if not torch.equal(rows[name], trained[name])}
    assert any("<cat>" in name for name in changed) and any("lora_B" in name for name in changed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_vectors_are_fp32_beside_a_table_of_any_dtype(folders, dtype):
    module = taught("sdxl", folders["sdxl"], Embedding(embeddings=CAT), dtype=dtype)
    assert {parameter.dtype for parameter in module.trained_parameters().values()} == {torch.float32}
    assert module.encode_prompt(["a <cat>"])["hidden"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


def test_text_is_not_cached_while_a_word_is_learned(folders, family):
    assert taught(family, folders[family], Embedding(embeddings=CAT)).trains_text
    assert taught(family, folders[family], Embedding(embeddings={"cat": {"output": True}})).trains_text


def test_dropout_stays_off_in_a_text_encoder_that_only_learns_words(folders):
    """T5's config asks for 0.1."""
    module = taught("pixart_alpha", folders["pixart_alpha"], Embedding(embeddings=CAT))
    once, again = (module.encode_prompt(["a <cat>"])["hidden"] for _ in range(2))
    assert torch.equal(once, again)


def test_each_embedding_has_its_own_learning_rate_and_end(folders):
    words = {"cat": {"lr": 0.5, "stop_after": "3 epochs"}, "dog": {}}
    module = taught("sd15", folders["sd15"], Embedding(embeddings=words))
    assert [(group.lr, group.stop_after) for group in module.groups] == [(0.5, "3 epochs"), (None, None)]


# Norms


def test_vectors_keep_the_median_norm_of_the_vocabulary(folders, family):
    module = taught(family, folders[family], Embedding(embeddings=CAT))
    train(module, "a <cat>")
    for encoder in module.text_encoders:
        table = module.part(encoder).get_input_embeddings().weight
        median = sorted(table.float().norm(dim=1).tolist())[(len(table) - 1) // 2]
        norms = module.embeddings.rows[encoder].trained("cat").norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, median), rtol=1e-5, atol=0)


def test_without_preserve_norm_vectors_have_any(folders):
    module = taught("sd15", folders["sd15"], Embedding(embeddings={"cat": {"preserve_norm": False}}))
    row = next(iter(module.trained_parameters().values()))
    before = row.detach().norm()
    train(module, "a <cat>", steps=3)
    assert abs(row.detach().norm() / before - 1) > 0.01


def test_output_vectors_keep_their_own_norms(folders):
    module = taught("sdxl", folders["sdxl"], Embedding(embeddings={"cat": {"output": True, "vectors": 3}}))
    before = {name: rows.norm(dim=1) for name, rows in vectors(module).items()}
    train(module, "a <cat>")
    for name, rows in vectors(module).items():
        torch.testing.assert_close(rows.norm(dim=1), before[name], rtol=1e-5, atol=0)


def test_vectors_that_have_stopped_keep_their_bits(folders):
    module = taught("sd15", folders["sd15"], Embedding(embeddings=CAT))
    train(module, "a <cat>")
    before = vectors(module)
    module.embeddings.after_step()
    assert all(torch.equal(before[name], rows) for name, rows in vectors(module).items())


# Words


def test_a_new_word_that_begins_as_an_old_one_reads_like_it(folders, family):
    """Also the pooled vector: where the end of the text is taken for the highest id, the new token would be it."""
    module = taught(family, folders[family], Embedding(embeddings={"cat": {"init": "c", "preserve_norm": False}}))
    plain = taught(family, folders[family], None)
    for written, meant in (("a <cat> on gras", "a c on gras"), ("<cat>", "c"), ("b <cat>", "b c")):
        found, expected = module.encode_prompt([written, "d"]), plain.encode_prompt([meant, "d"])
        for key in expected:
            torch.testing.assert_close(found[key].float(), expected[key].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["sdxl", "stable_cascade"])
def test_pooling_as_published_would_have_read_the_new_token(folders, family):
    """The test above sees the hazard."""
    module = taught(family, folders[family], Embedding(embeddings={"cat": {"init": "c", "preserve_norm": False}}))
    right = module.encode_prompt(["a <cat> on gras"])["pooled"]
    assert {part.eos_token_id for part in pooling(module.part(module.text_encoders[-1]))} == {49407}
    for part in pooling(module.part(module.text_encoders[-1])):
        part.eos_token_id = 2
    assert (module.encode_prompt(["a <cat> on gras"])["pooled"] - right).abs().max() > 1e-3


def test_a_placeholder_becomes_as_many_tokens_as_vectors(folders):
    module = taught("sd15", folders["sd15"], Embedding(embeddings={"cat": {"vectors": 3}, "dog": {"vectors": 2}}))
    module.encode_prompt(["a <dog>, <cat> b"])
    rows = module.embeddings.rows["text_encoder"]
    size = len(module.embeddings.tokenizers["tokenizer"][0])
    plain = [320, 267, 321]  # "a</w>", ",</w>", "b</w>" in CLIP's vocabulary
    expected = [49406, plain[0], size + 3, size + 4, plain[1], size, size + 1, size + 2, plain[2], 49407]
    assert rows.read[0, : len(expected)].tolist() == expected


def test_a_word_in_the_middle_of_another_is_left_alone(folders):
    module = taught("sd15", folders["sd15"], Embedding(embeddings={"new": {"placeholder": "gle"}}))
    assert module.embeddings.rewrite(["eagles google gles", "(gle) gle-gle"]) == [
        "eagles google gles",
        "(<|0:0|>) <|0:0|>-<|0:0|>",
    ]


def test_the_longer_of_two_placeholders_is_meant(folders):
    words = {"a": {"placeholder": "sks"}, "b": {"placeholder": "sks dog"}}
    module = taught("sd15", folders["sd15"], Embedding(embeddings=words))
    assert module.embeddings.rewrite(["a sks dog, a sks cat"]) == ["a <|1:0|>, a <|0:0|> cat"]


def test_captions_without_placeholders_read_as_before(folders, family):
    module, plain = (taught(family, folders[family], each) for each in (Embedding(embeddings=CAT), None))
    found, expected = (each.encode_prompt(["a dog", ""]) for each in (module, plain))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_word_that_the_model_knows_is_warned_of(folders, caplog):
    taught("sd15", folders["sd15"], Embedding(embeddings={"new": {"placeholder": "cat"}}))
    assert "placeholder=cat is a word that the model knows already" in caplog.text
    caplog.clear()
    taught("sd15", folders["sd15"], Embedding(embeddings={"new": {}}))
    assert caplog.text == ""


def test_drawing_reads_the_new_word(folders):
    module = taught("sd15", folders["sd15"], Embedding(embeddings=CAT))
    options = {"steps": 2, "guidance": 2.0, "size": Size(64, 64)}
    before = module.draw(["a <cat>"], [0], **options)[0]
    with torch.no_grad():
        next(iter(module.trained_parameters().values())).mul_(-1)
    assert module.draw(["a <cat>"], [0], **options)[0].tobytes() != before.tobytes()


# Where it starts


def test_vectors_begin_as_the_words_of_init_over_and_over(folders):
    words = {"x": {"init": "red cat", "vectors": 3, "preserve_norm": False}}
    module = taught("sd15", folders["sd15"], Embedding(embeddings=words))
    table = module.part("text_encoder").get_input_embeddings().weight
    red, cat = module.embeddings.tokenizers["tokenizer"][0]("red cat", add_special_tokens=False).input_ids
    assert torch.equal(next(iter(module.trained_parameters().values())), table[[red, cat, red]])


def test_vectors_that_keep_the_median_norm_begin_with_it(folders, family):
    """So that the first step changes no more than any other."""
    word = {"init": "c d", "vectors": 3}
    kept, free = (
        taught(family, folders[family], Embedding(embeddings={"x": word | {"preserve_norm": preserve}}))
        for preserve in (True, False)
    )
    for encoder in kept.text_encoders:
        ours, words = (module.embeddings.rows[encoder].trained("x").detach() for module in (kept, free))
        norms = kept.part(encoder).get_input_embeddings().weight.float().norm(dim=1)
        torch.testing.assert_close(ours.norm(dim=1), norms.median().expand(3), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.cosine_similarity(ours, words), torch.ones(3))
        assert (words.norm(dim=1) / norms.median() - 1).abs().max() > 1e-3
        before = ours.clone()
        kept.embeddings.after_step()
        assert torch.equal(kept.embeddings.rows[encoder].trained("x"), before)


def test_vectors_of_a_file_begin_as_they_are_whatever_their_norm(folders, tmp_path):
    file = moved("sd15", folders["sd15"], Embedding(embeddings=CAT)).export(tmp_path / "final")
    module = taught("sd15", folders["sd15"], Embedding(embeddings={"cat": {"file": str(file)}}))
    assert torch.equal(next(iter(vectors(module).values())), load_file(file)["emb_params"])


def test_vectors_are_as_many_as_the_words_of_init(folders):
    module = taught("sd15", folders["sd15"], Embedding(embeddings={"x": {"init": "red cat"}, "y": {}}))
    assert module.embeddings.counts == {"x": 2, "y": 1}


def test_a_random_start_is_a_function_of_the_seed(folders):
    def start(seed):
        torch.manual_seed(seed + 99)
        method = Embedding(embeddings={"x": {"vectors": 2}})
        return vectors(taught("sdxl", folders["sdxl"], method, seed=seed))

    one, same, other = start(0), start(0), start(1)
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)


def test_output_vectors_begin_as_what_the_encoder_makes_of_the_words(folders, family):
    method = Embedding(embeddings={"x": {"init": "c d", "output": True}})
    module, plain = taught(family, folders[family], method), taught(family, folders[family], None)
    found, expected = module.encode_prompt(["<x>"]), plain.encode_prompt(["c d"])
    torch.testing.assert_close(found["hidden"], expected["hidden"], rtol=0, atol=1e-6)


def test_output_vectors_stand_in_their_places_and_nowhere_else(folders, family):
    method = Embedding(embeddings={"x": {"init": "c d", "output": True}})
    module, plain = taught(family, folders[family], method), taught(family, folders[family], None)
    before = plain.encode_prompt(["a c d b"])["hidden"]
    with torch.no_grad():
        for number, parameter in enumerate(module.trained_parameters().values()):
            parameter.fill_(7.0 + number)
    found = module.encode_prompt(["a <x> b"])["hidden"]
    changed = (found != before).any(dim=-1)[0].nonzero().flatten().tolist()
    first = 1 if family == "pixart_alpha" else 2  # CLIP begins with a token of its own
    assert changed == [first, first + 1]
    widths = [module.part(encoder).get_input_embeddings().weight.shape[1] for encoder in module.text_encoders]
    expected = torch.cat([torch.full((width,), 7.0 + number) for number, width in enumerate(widths)])
    assert torch.equal(found[0, first], expected)


# Files


def moved(name, folder, method, **output):
    """A module whose vectors have gone some way."""
    module = taught(name, folder, method)
    module.output_options = Output(**{"dtype": "fp32"} | output)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def test_the_file_has_the_keys_that_tools_look_for(folders, family, tmp_path):
    module = moved(family, folders[family], Embedding(embeddings=CAT))
    tensors = load_file(module.export(tmp_path / "final"))
    assert set(tensors) == KEYS[family]
    expected = {tuple(parameter.shape) for parameter in module.trained_parameters().values()}
    assert {tuple(tensor.shape) for tensor in tensors.values()} == expected


def test_the_file_reads_in_diffusers_as_the_live_vectors_sd15(folders, tmp_path):
    module = moved("sd15", folders["sd15"], Embedding(embeddings=CAT))
    file = module.export(tmp_path / "final")
    stock = StableDiffusionPipeline.from_pretrained(folders["sd15"], safety_checker=None)
    stock.load_textual_inversion(str(file), token="<cat>")
    captions = ["a photo of <cat> on grass", "<cat>"]
    with torch.no_grad():
        found, _ = stock.encode_prompt(captions, "cpu", 1, False)
        expected = module.encode_prompt(captions)["hidden"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_file_reads_in_diffusers_as_the_live_vectors_sdxl(folders, tmp_path):
    module = moved("sdxl", folders["sdxl"], Embedding(embeddings=CAT))
    tensors = load_file(module.export(tmp_path / "final"))
    stock = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"], add_watermarker=False)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(stock, f"text_encoder{end}"), getattr(stock, f"tokenizer{end}")
        stock.load_textual_inversion(tensors[key], token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
    stock.text_encoder_2.text_model.eos_token_id = 49407  # the published 2 pools at the new token: docs/methods
    captions = ["a photo of <cat> on grass", "<cat>"]
    with torch.no_grad():
        found, _, pooled, _ = stock.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        expected = module.encode_prompt(captions)
    torch.testing.assert_close(found, expected["hidden"], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, expected["pooled"], rtol=0, atol=1e-5)


def test_several_embeddings_are_a_folder(folders, tmp_path):
    method = Embedding(embeddings=CAT | {"dog": {"output": True}})
    path = moved("sdxl", folders["sdxl"], method).export(tmp_path / "final")
    assert path == tmp_path / "final"
    assert {file.name for file in path.iterdir()} == {"cat.safetensors", "dog.safetensors"}
    assert set(load_file(path / "dog.safetensors")) == {"clip_l_out", "clip_g_out"}


@pytest.mark.parametrize("output", [False, True])
def test_a_run_goes_on_from_a_file(folders, family, output, tmp_path):
    first = moved(family, folders[family], Embedding(embeddings={"cat": {"vectors": 3, "output": output}}))
    file = first.export(tmp_path / "final")
    words = {"cat": {"file": str(file), "output": output, "preserve_norm": False}}
    again = taught(family, folders[family], Embedding(embeddings=words))
    expected, found = vectors(first), vectors(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_file_of_another_family_is_refused(folders, tmp_path):
    file = moved("pixart_alpha", folders["pixart_alpha"], Embedding(embeddings=CAT)).export(tmp_path / "final")
    with pytest.raises(SettingsError, match=r"embeddings\.cat\.file=.*no vectors under clip_l.*t5xxl \[3, 32\]"):
        taught("sdxl", folders["sdxl"], Embedding(embeddings={"cat": {"file": str(file)}}))


def test_the_number_of_vectors_is_the_files(folders, tmp_path):
    file = moved("sd15", folders["sd15"], Embedding(embeddings=CAT)).export(tmp_path / "final")
    with pytest.raises(SettingsError, match=r"vectors=5: .* has 3; leave vectors out"):
        taught("sd15", folders["sd15"], Embedding(embeddings={"cat": {"file": str(file), "vectors": 5}}))


# Beside other methods


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("sd15", {"bundle_emb.cat.string_to_param.*"}),
        ("sdxl", {"bundle_emb.cat.clip_l", "bundle_emb.cat.clip_g"}),
        ("pixart_alpha", {"bundle_emb.cat.t5xxl"}),
    ],
)
@pytest.mark.parametrize("style", list(LoraFormat))
def test_a_lora_carries_embeddings_along(folders, family, keys, style, tmp_path):
    method = Lora(rank=2, embeddings=CAT, bundle_embeddings=True)
    module = moved(family, folders[family], method, format=style)
    file = module.export(tmp_path / "final")
    assert list(tmp_path.iterdir()) == [file]
    tensors = load_file(file)
    assert {key for key in tensors if key.startswith("bundle_emb")} == keys
    words = {"cat": {"file": str(file), "preserve_norm": False}}
    again = taught(family, folders[family], Lora(rank=2, from_file=str(file), embeddings=words))
    expected, found = vectors(module), vectors(again)
    assert {name for name in found if "<cat>" in name} == {name for name in expected if "<cat>" in name}
    assert all(torch.equal(expected[name], found[name]) for name in found if "<cat>" in name)


def test_embeddings_lie_beside_a_lora(folders, tmp_path):
    module = moved("sd15", folders["sd15"], Lora(rank=2, embeddings=CAT))
    module.export(tmp_path / "final-step-000500")
    assert {file.name for file in tmp_path.iterdir()} == {
        "final-step-000500.safetensors",
        "cat-step-000500.safetensors",
    }
    stock = StableDiffusionPipeline.from_pretrained(folders["sd15"], safety_checker=None)
    stock.load_lora_weights(tmp_path / "final-step-000500.safetensors")


def test_embeddings_lie_beside_a_fine_tuned_model_whose_vocabulary_is_as_large_as_ever(folders, tmp_path):
    module = moved("sdxl", folders["sdxl"], Finetune(embeddings=CAT))
    module.export(tmp_path / "final")
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "final", add_watermarker=False)
    published = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"], add_watermarker=False)
    for encoder in ("text_encoder", "text_encoder_2"):
        found, expected = getattr(stock, encoder).state_dict(), getattr(published, encoder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(stock.tokenizer) == len(stock.tokenizer_2) == 49408
    assert set(load_file(tmp_path / "cat.safetensors")) == {"clip_l", "clip_g"}
    assert "hidden" in module.encode_prompt(["a <cat>"])  # and back again


def test_a_name_that_the_result_has_already_is_refused(folders):
    with pytest.raises(SettingsError, match=r"embeddings\.final: output\.name=final already names"):
        taught("sd15", folders["sd15"], Lora(embeddings={"final": {}}))


@pytest.mark.parametrize("output", [False, True])
def test_a_family_that_reads_no_text_is_refused(output):
    class Blind(StableDiffusion):
        text_encoders = ()

    module = Blind("published/weights")
    module.method = Embedding(embeddings={"cat": {"output": output}})
    with pytest.raises(SettingsError, match="Blind has no text encoder, so no word can be taught"):
        module.build_skeleton()


def test_output_vectors_are_refused_before_weights_are_loaded_where_encoders_do_not_lie_side_by_side():
    class Behind(StableDiffusionXL):
        def encode_prompt(self, captions):
            cond = super().encode_prompt(captions)
            return cond | {"hidden": cond["hidden"][..., :768]}

    module = Behind("published/weights")
    module.method = Embedding(embeddings={"cat": {}})
    module.build_skeleton()  # ordinary vectors have their place
    module.method = Embedding(embeddings={"cat": {"output": True}})
    with pytest.raises(SettingsError, match=r"Behind does not read .* side by side, so output=true has no place there"):
        module.build_skeleton()


def test_bundling_nothing_is_refused():
    with pytest.raises(SettingsError, match="bundle_embeddings=true: there are no embeddings"):
        Lora(bundle_embeddings=True)


def test_a_method_without_embeddings_is_refused():
    with pytest.raises(
        SettingsError, match=r"method\.embeddings: there are no embeddings; .* method\.embeddings\.NAME\.init=WORD"
    ):
        Embedding(embeddings={})


# Plans


def test_at_full_size_four_vectors_have_four_times_the_width(family):
    others = {"effnet": "published/effnet", "decoder": "published/decoders"} if family in FAMILIES else {}
    module = BUILDERS[family][0]("published/weights", **others)
    module.method = Embedding(embeddings={"cat": {"vectors": 4, "init": "cat"}})
    module.build_skeleton()
    assert sum(p.numel() for p in module.trained_parameters().values()) == 4 * WIDTHS[family]
    assert math.prod(module.to("meta").encode_prompt(["a <cat>"])["hidden"].shape) > 0


def test_a_plan_knows_output_vectors(family):
    others = {"effnet": "published/effnet", "decoder": "published/decoders"} if family in FAMILIES else {}
    module = BUILDERS[family][0]("published/weights", **others)
    module.method = Embedding(embeddings={"cat": {"vectors": 4, "output": True}})
    module.build_skeleton()
    assert sum(p.numel() for p in module.trained_parameters().values()) == 4 * WIDTHS[family]


def test_too_many_vectors_for_a_prompt_are_refused(folders):
    with pytest.raises(SettingsError, match="vectors=76: a prompt has room for 75 tokens"):
        taught("sd15", folders["sd15"], Embedding(embeddings={"cat": {"vectors": 76}}))


def test_nor_are_those_of_a_file_taken(folders, tmp_path):
    file = tmp_path / "many.safetensors"
    save_file({"emb_params": torch.zeros(76, 32)}, file)
    for step in ("build_skeleton", "configure_model"):
        module = StableDiffusion(str(folders["sd15"]))
        module.method = Embedding(embeddings={"cat": {"file": str(file)}})
        with pytest.raises(SettingsError, match=r"file=.*many\.safetensors has 76 vectors: a prompt has room for 75"):
            getattr(module, step)()
