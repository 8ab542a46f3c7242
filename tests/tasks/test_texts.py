"""What a plan says of captions: what each image is called, how many texts that makes, and what of them is not read."""

from pathlib import Path

import pytest

from otl.config import CaptionOptions, Data
from otl.methods.embedding import Embedding
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.modules.wuerstchen import Wuerstchen
from otl.tasks import plan
from otl.tasks.texts import Called, cut_off
from otl.types import Problem, Sample, Size
from tests import tiny
from tests.datamodules.fakes import picture


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory) -> Path:
    """With CLIP's whole vocabulary: tokens are counted here."""
    return tiny.sd15(tmp_path_factory.mktemp("sd15"), words=tiny.CLIP)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory) -> Path:
    return tiny.sdxl(tmp_path_factory.mktemp("sdxl"), words=tiny.CLIP)


@pytest.fixture
def photos(tmp_path) -> Path:
    picture(tmp_path / "photos" / "a.png", caption="a, b, c, d, e")
    picture(tmp_path / "photos" / "b.png", shade=9, caption="a dog\na black dog")
    picture(tmp_path / "photos" / "c.png", shade=19, caption=None)
    return tmp_path / "photos"


def made(settings, checkpoint, photos, *overrides):
    return plan.make(
        settings(
            f"model.checkpoint={checkpoint}",
            f"data.path={photos}",
            "data.resolution=64",
            "data.missing_captions=skip",
            "logger=none",
            *overrides,
        )
    )[0]


def rows(got, name: str) -> dict[str, object]:
    """File -> what the plan says of it under a name."""
    return {Path(row["path"]).name: row[name] for row in got["images"]}


def test_every_image_has_its_first_caption_and_the_number_of_its_texts(settings, sd15_folder, photos):
    got = made(settings, sd15_folder, photos, "data.captions.shuffle=true", "data.caption_variants=4")
    assert rows(got, "caption") == {"a.png": "a, b, c, d, e", "b.png": "a dog", "c.png": None}
    assert rows(got, "texts") == {"a.png": 4, "b.png": 2, "c.png": 0}
    assert got["captions"] == {"cached": True, "distinct": 6}


def test_the_empty_text_is_encoded_too_and_an_equal_one_once(settings, sd15_folder, photos):
    got = made(settings, sd15_folder, photos, "data.caption_dropout=0.1", "data.captions.prefix='{x}'")
    assert rows(got, "caption")["b.png"] == "{x} a dog"
    assert got["captions"]["distinct"] == 3 + 1
    picture(photos / "d.png", shade=29, caption="a black dog")
    assert made(settings, sd15_folder, photos)["captions"]["distinct"] == 3


def test_an_image_left_out_for_want_of_a_caption_is_in_the_plan(settings, sd15_folder, photos):
    got = made(settings, sd15_folder, photos)
    assert (got["images_total"], got["images_used"], got["images_dropped"]) == (3, 2, 1)
    assert "no caption" in rows(got, "reason")["c.png"] and rows(got, "dropped")["c.png"]


def test_without_a_cache_of_texts_varied_captions_have_no_number(settings, sd15_folder, photos):
    overrides = ["method.parts.text_encoder.lr=1e-5", "data.captions.shuffle=true", "data.caption_variants=4"]
    got = made(settings, sd15_folder, photos, *overrides)
    assert rows(got, "texts") == {"a.png": None, "b.png": None, "c.png": 0}
    assert got["captions"] == {"cached": False, "distinct": None}
    assert [each["message"] for each in got["warnings"] if each["about"] == "data.caption_variants"] == [
        "4 has no effect while a text encoder trains: each draw then has a text of its own"
    ]


def test_a_new_word_may_stand_in_the_trigger(settings, sd15_folder, photos):
    method = ["method=embedding", "method.embeddings.cat.init=cat"]
    got = [made(settings, sd15_folder, photos, *method, *more) for more in ([], ["data.captions.trigger='<cat>'"])]
    untaught = [[each for each in some["warnings"] if "placeholder" in each["about"]] for some in got]
    assert len(untaught[0]) == 1 and untaught[1] == []


# What is not read


def cut(module, *captions: str, **options) -> list[Problem]:
    """What is said of images with these captions."""
    samples = [Sample(Path(f"{number}.png"), Size(64, 64), [text]) for number, text in enumerate(captions)]
    return cut_off(samples, Called(Data(captions=CaptionOptions(**options)), seed=0, cached=True), module)


def skeleton(family, checkpoint, method=None, **options):
    module = family(str(checkpoint), **options)
    module.method = method
    module.build_skeleton()
    return module


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_captions_longer_than_a_prompt_are_named_with_what_is_cut_off(family, sd15_folder, sdxl_folder):
    module = skeleton(family, sdxl_folder if family is StableDiffusionXL else sd15_folder)
    words = ["cat"] * 75
    (problem,) = cut(module, " ".join(words), " ".join([*words, "red", "Dog"]), " ".join(words * 2), "a")
    assert problem.key == "data.captions" and not problem.fatal
    assert problem.details == [
        f"2.png: 150 tokens, not read: '{' '.join(words)[:80]}…'",
        "1.png: 77 tokens, not read: 'red Dog'",
    ]
    assert "2 of 4 images have captions of more than 75 tokens (up to 150)" in problem.message
    assert "model.chunks=2" in problem.message


def test_chunks_read_further(sd15_folder):
    module = skeleton(StableDiffusion, sd15_folder, chunks=2)
    (problem,) = cut(module, " ".join(["cat"] * 150), " ".join(["cat"] * 151))
    assert [detail.partition(":")[0] for detail in problem.details] == ["1.png"]
    assert "more than 150 tokens" in problem.message and "model.chunks=3" in problem.message


def test_what_is_put_before_and_every_choice_count(sd15_folder):
    module, words = skeleton(StableDiffusion, sd15_folder), " ".join(["cat"] * 74)
    assert cut(module, words) == []
    assert len(cut(module, words, prefix="a big")) == 1
    assert len(cut(module, words + " {dog|red dog}", wildcards=True)) == 1
    assert cut(module, words + " {dog|cat}", wildcards=True) == []


def test_the_vectors_of_a_new_word_count_as_tokens(sd15_folder):
    words = " ".join([*["cat"] * 70, "<new>"])
    for vectors, problems in ((5, 0), (6, 1)):
        module = skeleton(StableDiffusion, sd15_folder, Embedding(embeddings={"new": {"vectors": vectors}}))
        assert len(cut(module, words)) == problems


def test_families_of_the_hub_are_counted_by_the_tokenizer_that_ships_with_otl():
    """Nothing of the checkpoint is here; "cat" is one token, so is each letter of CLIP's "a b c"."""
    for family in (StableDiffusion, Wuerstchen):
        options = {} if family is StableDiffusion else {"effnet": "nowhere/effnet", "decoder": "nowhere/decoder"}
        module = family("nowhere/at-all", **options)
        module.build_skeleton()
        (problem,) = cut(module, " ".join(["cat"] * 76), " ".join(["cat"] * 75))
        assert problem.details == ["0.png: 76 tokens, not read: 'cat'"]


def test_t5_is_counted_where_its_tokenizer_is_here_and_else_it_is_said(tmp_path):
    """The tiny one has a token for each letter: 119 and an end are read. Captions are put in lower case first."""
    (problem,) = cut(skeleton(PixArtAlpha, "nowhere/at-all"), "a")
    assert "not known" in problem.message and "nowhere/at-all" in problem.message and not problem.fatal
    module = skeleton(PixArtAlpha, tiny.pixart_alpha(tmp_path / "pixart"))
    (problem,) = cut(module, "A" * 119, "A" * 119 + "BC")
    assert problem.details == ["1.png: 121 tokens, not read: 'bc'"]
    assert "chunks" not in problem.message
