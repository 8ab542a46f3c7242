"""Textual inversion finds what the shipped checkpoint can draw: a word for a thing of three properties."""

from random import Random

import pytest

from examples.shapes.classify import classify
from examples.shapes.draw import Scene, draw
from otl.config import assets_dir
from otl.methods.embedding import Embedding
from otl.modules.stable_diffusion import StableDiffusion
from otl.tasks.train import train
from otl.types import Size


@pytest.mark.slow
@pytest.mark.long
def test_a_word_comes_to_mean_what_its_pictures_show(settings, tmp_path):
    random = Random(3)
    (tmp_path / "photos").mkdir()
    for number in range(8):
        picture = draw(Scene("large", "purple", "triangle", "yellow"), random)
        picture.save(tmp_path / "photos" / f"{number}.png")
    run = settings(
        f"model.checkpoint={assets_dir() / 'shapes'}",
        "method=embedding",
        "method.embeddings.thing.vectors=4",
        "method.templates=['a {}']",
        "optimizer.lr=3e-2",
        "optimizer.weight_decay=0",
        f"data.path={tmp_path / 'photos'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.resolution=64",
        "data.batch_size=4",
        "data.workers=0",
        "logger=none",
        "trainer.max_steps=100",
        "callbacks.checkpoint=null",
        "callbacks.sampling=null",
    )
    (tmp_path / "run").mkdir()
    train(run, tmp_path / "run")

    def shown(**words):
        module = StableDiffusion(str(assets_dir() / "shapes"))
        module.method = Embedding(embeddings={"thing": words})
        module.configure_model()
        drawn = module.draw(["a <thing>"] * 4, [0, 1, 2, 3], steps=20, guidance=3.0, size=Size(64, 64))
        return [(seen.colour, seen.shape) for seen in map(classify, drawn)]

    assert shown(vectors=4).count(("purple", "triangle")) == 0
    assert shown(file=str(tmp_path / "run" / "final.safetensors")).count(("purple", "triangle")) >= 3
