"""Long prompts in chunks, against A1111's way of reading them, computed here by hand."""

import pytest
import torch
from torch import Tensor

from otl.check import check
from otl.methods.embedding import Embedding
from otl.modules.clip import tokenize
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.types import Size
from tests import tiny
from tests.methods.words import batch_of, taught

START, END = 49406, 49407
CAT = 2368  # "cat</w>" in CLIP's vocabulary
LONG = " ".join(["a photo of a cat"] * 32)  # 160 tokens: two chunks and ten
CAPTIONS = [LONG, "a cat", " ".join(["cat"] * 75), " ".join(["cat"] * 76), ""]
FAMILIES = {"sd15": StableDiffusion, "sdxl": StableDiffusionXL}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(family, chunks) -> the module with its weights."""
    made = {}
    folders = {name: tiny.BUILDERS[name](tmp_path_factory.mktemp(name), words=tiny.CLIP) for name in FAMILIES}

    def load(family: str, chunks: int):
        if (family, chunks) not in made:
            made[family, chunks] = FAMILIES[family](str(folders[family]), chunks=chunks)
            made[family, chunks].configure_model()
        return made[family, chunks]

    return load


def by_hand(tokenizer, caption: str, chunks: int) -> Tensor:
    """[chunks, 77]: the text's ids cut after every 75, each between a start and an end, padded to 77."""
    ids = tokenizer(caption, add_special_tokens=False).input_ids[: 75 * chunks]
    rows = []
    for number in range(chunks):
        row = [START, *ids[75 * number : 75 * (number + 1)], END]
        rows.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
    return torch.tensor(rows)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])  # padded with the end token, and with "!"
def test_every_chunk_is_a_prompt_of_its_own(loaded, chunks, name):
    tokenizer = getattr(loaded("sdxl", 1).pipeline, name)
    expected = torch.cat([by_hand(tokenizer, caption, chunks) for caption in CAPTIONS])
    assert torch.equal(tokenize(tokenizer, CAPTIONS, chunks=chunks), expected)


def test_the_words_above_are_tokens_of_cat(loaded):
    assert by_hand(loaded("sd15", 1).pipeline.tokenizer, "cat", 1)[0, :3].tolist() == [START, CAT, END]


@pytest.mark.parametrize("chunks", [1, 3])
def test_stable_diffusion_reads_each_chunk_alone_and_puts_them_in_a_row(loaded, chunks):
    module = loaded("sd15", chunks)
    pipe = module.pipeline
    with torch.no_grad():
        found = module.encode_prompt(CAPTIONS)["hidden"]
        for row, caption in enumerate(CAPTIONS):
            parts = [pipe.text_encoder(ids[None]).last_hidden_state for ids in by_hand(pipe.tokenizer, caption, chunks)]
            torch.testing.assert_close(found[row : row + 1], torch.cat(parts, dim=1))
    assert found.shape == (len(CAPTIONS), chunks * 77, 32)


@pytest.mark.parametrize("chunks", [1, 3])
def test_sdxl_pools_the_first_chunk(loaded, chunks):
    module = loaded("sdxl", chunks)
    pipe = module.pipeline
    with torch.no_grad():
        found = module.encode_prompt(CAPTIONS)
        for row, caption in enumerate(CAPTIONS):
            one = pipe.text_encoder(by_hand(pipe.tokenizer, caption, chunks), output_hidden_states=True)
            two = pipe.text_encoder_2(by_hand(pipe.tokenizer_2, caption, chunks), output_hidden_states=True)
            hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).flatten(0, 1)
            torch.testing.assert_close(found["hidden"][row], hidden)
            torch.testing.assert_close(found["pooled"][row], two.text_embeds[0])


def test_without_chunks_what_is_long_is_cut_and_with_them_it_is_read(loaded):
    other = f"{LONG[: len(LONG) // 2]} {LONG.replace('cat', 'dog')[len(LONG) // 2 :]}"
    for chunks, same in ((1, True), (3, False)):
        with torch.no_grad():
            one, two = loaded("sd15", chunks).encode_prompt([LONG, other])["hidden"]
        assert torch.equal(one, two) is same


def test_the_cache_tells_chunks_apart(loaded):
    assert len({loaded("sd15", chunks).prompt_identity() for chunks in (1, 2, 3)}) == 3


def test_a_plan_knows_the_length_of_prompts(sdxl_folder):
    module = StableDiffusionXL(str(sdxl_folder), chunks=3)
    module.build_skeleton()
    module.to("meta")
    cond = module.encode_prompt(["a", "b"])
    assert {name: tuple(value.shape) for name, value in cond.items()} == {"hidden": (2, 231, 80), "pooled": (2, 32)}


def test_chunks_are_a_setting_of_families_that_clip_leads(settings):
    def wrong(model):
        return [each.key for each in check(settings("data.path=.", f"model={model}", "++model.chunks=2"))]

    assert (wrong("sd15"), wrong("sd21"), wrong("sdxl")) == ([], [], [])
    assert (wrong("pixart_alpha"), wrong("stable_cascade")) == (["model.chunks"], ["model.chunks"])


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts_train_and_draw(loaded, family):
    module = loaded(family, 2)
    losses = module.losses(batch_of(module, LONG), u=torch.tensor([0.3, 0.7]), stream="noise")
    other = module.losses(batch_of(module, LONG.replace("cat", "dog")), u=torch.tensor([0.3, 0.7]), stream="noise")
    assert losses.isfinite().all() and not torch.equal(losses, other)
    end = f"{' '.join(['a'] * 100)} cat"
    drawn = [module.draw([each], [0], steps=2, guidance=2.0, size=Size(64, 64))[0] for each in (end, end[:-4])]
    assert drawn[0].tobytes() != drawn[1].tobytes()


@pytest.mark.parametrize("output", [False, True])
def test_a_new_word_is_read_in_any_chunk(family_folder, output):
    family, folder = family_folder
    method = Embedding(embeddings={"cat": {"vectors": 2, "init": "cat", "output": output}})
    module = taught(family, folder, method, chunks=2)
    early, late = f"<cat> {' '.join(['a'] * 90)}", f"{' '.join(['a'] * 90)} <cat>"
    before = module.encode_prompt([early, late])["hidden"].detach()
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.neg_()
    moved = (module.encode_prompt([early, late])["hidden"].detach() - before).abs().sum(-1) > 1e-6
    assert moved.shape == (2, 154)
    assert moved[0, :77].any() and not moved[0, 77:].any()
    assert moved[1, 77:].any() and not moved[1, :77].any()
    if output:
        places = [torch.arange(1, 3), 77 + 1 + 15 + torch.arange(2)]  # 75 words in the first chunk, 15 before it
        assert [torch.where(each)[0].tolist() for each in moved] == [each.tolist() for each in places]


def test_a_skipped_layer_is_as_if_the_encoder_had_none(sd15_folder):
    module = StableDiffusion(str(sd15_folder), clip_skip=1)
    module.configure_model()
    found = module.encode_prompt(["a cat"])["hidden"]
    encoder = module.pipeline.text_encoder
    ids = module.tokens(module.pipeline.tokenizer, ["a cat"])
    whole = encoder(ids).last_hidden_state
    layers = getattr(encoder, "text_model", encoder).encoder.layers
    del layers[-1]
    assert torch.equal(found, encoder(ids).last_hidden_state)
    assert not torch.equal(found, whole)


def test_sdxl_skips_layers_of_both_encoders_as_diffusers_does(sdxl_folder):
    module = StableDiffusionXL(str(sdxl_folder), clip_skip=1)
    module.configure_model()
    found = module.encode_prompt(["a cat"])
    hidden, _, pooled, _ = module.pipeline.encode_prompt(
        "a cat", clip_skip=1, device="cpu", do_classifier_free_guidance=False
    )
    torch.testing.assert_close(found["hidden"], hidden)
    torch.testing.assert_close(found["pooled"], pooled)


def test_the_cache_tells_skipped_layers_apart(sd15_folder):
    modules = [StableDiffusion(str(sd15_folder), clip_skip=skip) for skip in (0, 1)]
    for module in modules:
        module.configure_model()
    assert modules[0].prompt_identity() != modules[1].prompt_identity()


def test_layers_are_skipped_by_families_that_clip_leads(settings):
    def wrong(*line):
        return [each.key for each in check(settings("data.path=.", *line))]

    assert wrong("model=sd15", "++model.clip_skip=1") == []
    assert wrong("model=sd15", "++model.clip_skip=-1") == ["model.clip_skip"]
    assert wrong("model=pixart_alpha", "++model.clip_skip=1") == ["model.clip_skip"]


@pytest.fixture(params=FAMILIES)
def family_folder(request, sd15_folder, sdxl_folder):
    return request.param, {"sd15": sd15_folder, "sdxl": sdxl_folder}[request.param]
