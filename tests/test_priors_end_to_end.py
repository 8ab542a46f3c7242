"""Wuerstchen and Stable Cascade as their users type it, on tiny checkpoints: trained, drawn, exported, reloaded."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_priors
from tests.commands import run_otl
from tests.modules.priors import CAPTIONS, batch, noise

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (160, 160), (40 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


@pytest.fixture(params=tiny_priors.FAMILIES)
def line(request, tmp_path, photos):
    """The family, its checkpoint and the command."""
    family, build = tiny_priors.FAMILIES[request.param]
    folder = build(tmp_path / "checkpoint")
    return family, folder, [
        f"model={request.param}",
        f"model.checkpoint={folder}",
        *(f"model.{name}={path}" for name, path in tiny_priors.options(folder).items()),
        f"data.path={photos}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.resolution=128",
        "data.workers=1",
        "optimizer.lr=1e-2",
    ]  # fmt: skip


def test_a_lora_is_trained_drawn_with_and_read_again(line, tmp_path):
    family, folder, words = line
    options = [
        "sample.prompts=[a cat]",
        "sample.steps=2",
        "sample.guidance=4",
        "output.format=peft",
        "output.dtype=fp32",
    ]
    parts = ["+method.parts.text_encoder={}"]
    done = run_otl(*words, *options, *parts, "trainer.max_steps=3", "hydra.run.dir=OUT", cwd=tmp_path)
    assert done.code == 0, done.err
    assert not re.search(r"warn|tip:|torchvision|deprecat", done.out + done.err, re.IGNORECASE)
    out = tmp_path / "OUT"
    pictures = sorted((out / "samples").glob("*/*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(128, 128)] * 2
    rows = json.loads((out / "plan.json").read_text())["weights"]
    assert {row["part"]: row["trained"] > 0 for row in rows} == {"prior": True, "text_encoder": True, "effnet": False}

    module = family(str(folder), **tiny_priors.options(folder))
    module.configure_model()
    t = torch.tensor([0.2, 0.7])

    def predicted():
        with torch.no_grad():
            return module.predict(noise(), t, module.encode_prompt(CAPTIONS), batch())

    before = predicted()
    applied = 0
    tensors = load_file(out / "final.safetensors")
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            part, _, path = key.removesuffix(".lora_A.weight").partition(".")
            up = tensors[key.replace("lora_A", "lora_B")]
            networks = module.part(part)
            own = path if path in dict(networks.named_modules()) else path.removeprefix("text_model.")
            networks.get_submodule(own).weight.data += up @ down
            applied += bool(up.any())
    assert 2 * applied == len(tensors) > 20
    assert (predicted() - before).abs().max() > 1e-3
