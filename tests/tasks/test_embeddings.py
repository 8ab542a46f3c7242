"""Whole runs that teach words: resumed, captioned by templates, refused where no caption has the word."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from otl.config import SettingsError
from otl.tasks.plan import make
from otl.tasks.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of four pictures; `bare` has no captions."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("told", "bare"):
        (folder / name).mkdir()
        for number in range(4):
            Image.new("RGB", (64, 64), (60 * number, 100, 200)).save(folder / name / f"{number}.png")
        if name == "told":
            for number in range(4):
                (folder / name / f"{number}.txt").write_text(f"picture {number} of <cat>\n")
    return folder


@pytest.fixture
def composed(settings, photos, tmp_path, sd15_folder):
    """Overrides -> the settings of a short run."""
    return lambda *overrides: settings(
        f"model.checkpoint={sd15_folder}",
        f"data.path={photos / 'told'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.resolution=64",
        "data.batch_size=2",
        "data.workers=0",
        "logger=none",
        "optimizer.lr=1e-2",
        "trainer.max_steps=4",
        "callbacks.checkpoint.every=2",
        "++callbacks.checkpoint.keep=10",
        *overrides,
    )


@pytest.fixture
def run(composed, tmp_path):
    """(folder name, overrides) -> the folder of a finished run."""

    def _run(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train(composed(*overrides), folder)
        return folder

    return _run


RESUMED = [
    ("method=embedding", "method.embeddings.cat.vectors=2", "callbacks.ema.decay=0.9"),
    ("method=embedding", "method.embeddings.cat.output=true", "optimizer=adamw8bit"),
    ("method=lora", "method.embeddings.cat.init=cat", "method.parts={denoiser: {}, text_encoder: {}}"),
    ("method=finetune", "method.embeddings.cat.stop_after=3"),
]


@pytest.mark.parametrize("overrides", RESUMED, ids=lambda each: " ".join(each))
def test_a_resumed_run_is_bit_equal_to_the_unbroken_one(run, overrides):
    whole = run("whole", *overrides)
    again = run("again", *overrides, f"resume={whole / 'checkpoints' / 'step-00000002.ckpt'}")
    a, b, start = (
        torch.load(file, weights_only=False)["state_dict"]
        for file in (
            whole / "checkpoints" / "step-00000004.ckpt",
            again / "checkpoints" / "step-00000004.ckpt",
            whole / "checkpoints" / "step-00000002.ckpt",
        )
    )
    words = [name for name in a if "<cat>" in name]
    assert len(words) == 1
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a[words[0]], start[words[0]])


def test_the_average_of_vectors_is_of_those_with_their_norm(run):
    """A step's norms are put right before the average is taken."""
    folder = run("run", "method=embedding", "method.embeddings.cat.vectors=2", "++callbacks.ema.decay=1e-9")
    state = torch.load(folder / "checkpoints" / "step-00000004.ckpt", weights_only=False)
    (live,) = state["state_dict"].values()
    (average,) = next(s["averages"] for name, s in state["callbacks"].items() if "EMA" in name).values()
    torch.testing.assert_close(average, live, rtol=1e-6, atol=1e-7)


def test_a_word_in_no_caption_is_refused_before_anything_is_loaded(run, composed):
    with pytest.raises(SettingsError, match=r"embeddings\.dog\.placeholder: <dog> is in no caption.*data\.prompt"):
        run("run", "method=embedding", "++method.embeddings={cat: {}, dog: {}}")
    _, fatal = make(composed("method=embedding", "++method.embeddings={cat: {}, dog: {}}"))
    assert [problem.key for problem in fatal] == ["method.embeddings.dog.placeholder"]


def test_templates_caption_the_images_that_have_none(run, photos):
    words = ("method=embedding", "method.embeddings.cat.vectors=1", f"data.path={photos / 'bare'}")
    with pytest.raises(SettingsError, match="4 of 4 images without a caption"):
        run("bare", *words)
    folder = run("run", *words, 'method.templates=["a photo of {}", "{} in a box"]')
    images = json.loads((folder / "plan.json").read_text())["images"]
    assert [image["caption_missing"] for image in images] == [False] * 4


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft", "finetune", "inpaint"])
def test_templates_are_a_setting_of_every_method_that_teaches_words(method, composed, photos):
    """Also on a command line: the plan finds the word in every caption."""
    words = (f"method={method}", "method.embeddings.cat.init=cat", f"data.path={photos / 'bare'}")
    _, fatal = make(composed(*words, "method.templates=object"))
    assert not fatal


def test_captions_of_their_own_stay(composed):
    from otl.datamodules.scan import scan
    from otl.tasks.run import build_module, data_options

    settings = composed(
        "method=embedding",
        "++method.embeddings={cat: {}, dog: {}}",
        "method.templates=['a {}', 'the {}']",
        f"data.concepts.dog.path={composed().data.path.replace('told', 'bare')}",
        f"data.concepts.other.path={composed().data.path}",
    )
    samples, problems = scan(data_options(settings, build_module(settings)))
    captions = {(sample.concept, *sample.captions) for sample in samples}
    told = {(concept, f"picture {n} of <cat>") for concept in ("data", "other") for n in range(4)}
    assert captions == told | {("dog", "a <dog>", "the <dog>")}
    assert not [problem for problem in problems if problem.fatal]


def test_a_lora_run_leaves_its_words_beside_it(run):
    folder = run("run", "method=lora", "method.rank=2", "method.embeddings.cat.vectors=3", "callbacks.export.every=2")
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names == {f"{name}{end}.safetensors" for name in ("final", "cat") for end in ("", "-step-000002")}
    assert load_file(folder / "cat.safetensors")["emb_params"].shape == (3, 32)
