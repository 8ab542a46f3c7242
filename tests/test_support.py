"""The whole way for every cell of the table, on photographs: train, draw, stop and resume, export, read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import skimage
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLInpaintPipeline
from diffusers import StableDiffusionXLPipeline as XLPipeline
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from otl.formats.lora import kohya_key
from otl.modules.base import DiffusionModule
from otl.tasks.run import build_module
from otl.tasks.train import train
from otl.testing import predicted
from tests import tiny_priors
from tests.cells import CELLS, FAMILIES, METHODS, build, readers
from tests.commands import run_otl
from tests.methods.kinds import published

pytestmark = pytest.mark.slow

PHOTOGRAPHS = {  # shipped with scikit-image
    "astronaut.png": "a photo of an astronaut, <cat>",
    "chelsea.png": "a photo of a <cat>",
    "coffee.png": "a cup of coffee beside a <cat>",
}
STEPS, STOP = 4, 2
STOCK = {"sd15": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": XLPipeline}
TYPED = {  # of each family the method whose run is typed as a command; between them, of every kind one
    "sd15": "inpaint",
    "sd21": "finetune",
    "sdxl": "lora + embedding",
    "wuerstchen": "oft",
    "stable_cascade": "lokr",
    "pixart_alpha": "embedding",
}
PAINTERS = {"sdxl": StableDiffusionXLInpaintPipeline}
LIKE_LIVE = {"rtol": 5e-3, "atol": 1e-4}  # Wuerstchen divides by small numbers


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, caption in PHOTOGRAPHS.items():
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            image.convert("RGB").save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


class Cell:
    """One family with one method, in a folder."""

    def __init__(self, family: str, method: str, folder: Path, photos: Path, settings: Callable[..., DictConfig]):
        self.family, self.method, self.folder, self.compose = family, method, folder, settings
        self.checkpoint = build(family, folder / "model")
        self.side = 128 if family in tiny_priors.FAMILIES else 64  # pixels; the decoders halve theirs more often
        self.line = [
            f"data.path={photos}",
            f"data.cache_dir={folder / 'cache'}",
            f"data.resolution={self.side}",
            "data.batch_size=2",
            "data.workers=0",
            "logger=none",
            "output.dtype=fp32",
            "optimizer.lr=1e-3",
            f"trainer.max_steps={STEPS}",
            f"callbacks.checkpoint.every={STOP}",
            "sample.prompts=['a photo of a <cat>']",
            "sample.steps=2",
            "callbacks.sampling.every=null",
            "callbacks.sampling.first=false",
        ]

    def words(self, method: str | None = None) -> list[str]:
        """Of the command."""
        return [*self.checkpoint, *METHODS[method or self.method].line, *self.line]

    def settings(self, *more: str, method: str | None = None) -> DictConfig:
        return self.compose(*self.words(method), *more)

    def typed(self, name: str) -> Path:
        """The run as `python -m otl` makes it."""
        done = run_otl(*self.words(), f"hydra.run.dir={self.folder / name}", cwd=self.folder, OMP_NUM_THREADS="1")
        assert done.code == 0, done.err
        return self.folder / name

    def run(self, name: str, *more: str) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        train(self.settings(*more), folder)
        return folder

    def module(self, *more: str, method: str | None = None) -> DiffusionModule:
        made = build_module(self.settings(*more, method=method))
        made.configure_model()
        return made

    def live(self, run: Path) -> DiffusionModule:
        """The module as it was when the run ended, by the checkpoint of its last step."""
        module = self.module()
        state = torch.load(run / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=False)["state_dict"]
        module.load_state_dict(state, strict=False)
        return module


@pytest.mark.parametrize(("family", "method"), CELLS, ids=map("-".join, CELLS))
def test_train_draw_resume_export_and_read_again(family, method, tmp_path, photos, settings):
    cell = Cell(family, method, tmp_path, photos, settings)
    whole = cell.typed("whole") if TYPED[family] == method else cell.run("whole")
    result = whole / METHODS[method].file
    assert result.exists()
    drawn = sorted((whole / "samples").glob(f"step-{STEPS:06d}/*-seed0.png"))
    assert [Image.open(path).size for path in drawn] == [(cell.side, cell.side)]

    resumed = cell.run("resumed", f"resume={whole / 'checkpoints' / f'step-{STOP:08d}.ckpt'}")
    assert contents(resumed) == contents(whole)

    live = cell.live(whole)
    before, after = predicted(cell.module()), predicted(live)
    assert not torch.allclose(before, after, **LIKE_LIVE), "nothing was learned"
    torch.testing.assert_close(predicted(read_again(cell, whole)), after, **LIKE_LIVE)
    for reader in readers(family, method):
        READ[reader](cell, live, result)


def contents(run: Path) -> dict[str, bytes]:
    """The tensors of all that a run wrote, by file and name."""
    files = [path for path in run.glob("**/*.safetensors") if "checkpoints" not in path.parts]
    assert files
    return {
        f"{path.relative_to(run)}:{name}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for path in files
        for name, tensor in load_file(path).items()
        if tensor.dim()
    }


def read_again(cell: Cell, run: Path) -> DiffusionModule:
    """A module that goes on from the result."""
    result = run / METHODS[cell.method].file
    if cell.method == "embedding":
        return cell.module(f"method.embeddings.cat.file={result}")
    if cell.method in {"finetune", "inpaint"}:
        return cell.module(f"model.checkpoint={result}")
    beside = [f"method.embeddings.cat.file={run / 'cat.safetensors'}"] if "embedding" in cell.method else []
    return cell.module(f"method.from_file={result}", *beside)


def by_formula(cell: Cell, live: DiffusionModule, file: Path) -> None:
    """The file's layers, added to the plain weights by their published formulas, predict as the live adapter does."""
    plain = cell.module(method="finetune")
    denoiser, tensors = plain.part("denoiser"), load_file(file)
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    names = plain.denoiser_names(list(layers))
    used: set[str] = set()
    for path, layer in layers.items():
        stem = kohya_key(plain.kohya_prefixes[plain.denoiser], names[path]) + "."
        own = {key.removeprefix(stem): tensor for key, tensor in tensors.items() if key.startswith(stem)}
        if own:
            used |= {stem + end for end in own}
            with torch.no_grad():
                layer.weight.add_(published(own, layer.weight).to(layer.weight))
    assert used == tensors.keys()
    torch.testing.assert_close(predicted(plain), predicted(live), **LIKE_LIVE)


def by_diffusers(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The stock pipeline's own loader."""
    if cell.method == "embedding":
        compare_words(cell, live, result)
    elif cell.method == "lora":
        pipe = STOCK[cell.family].from_pretrained(cell.folder / "model", safety_checker=None)
        pipe.load_lora_weights(result)
        compare_denoisers(live, pipe.unet)
    else:
        painter = PAINTERS.get(cell.family, StableDiffusionInpaintPipeline)
        kind = painter if cell.method == "inpaint" else STOCK[cell.family]
        compare_denoisers(live, kind.from_pretrained(result, safety_checker=None).unet)


def by_weights(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The denoiser's own class reads the folder."""
    own = live.part("denoiser")
    again = type(own).from_pretrained(result / live.denoiser).state_dict()
    assert again.keys() == own.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in own.state_dict().items())


def by_keys(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The embedding's file has each encoder's vectors under its key."""
    tensors = load_file(result if cell.method == "embedding" else result.with_name("cat.safetensors"))
    keys = KEYS[cell.family]
    assert tensors.keys() == set(keys)
    trained = {name: p for name, p in live.trained_parameters().items() if "cat" in name}
    for tensor in tensors.values():
        assert any(torch.equal(tensor, p) for p in trained.values() if p.shape == tensor.shape)
    assert len(trained) == len(keys)


READ = {"formula": by_formula, "diffusers": by_diffusers, "weights": by_weights, "keys": by_keys}
KEYS = {
    "sd15": ["emb_params"],
    "sd21": ["emb_params"],
    "sdxl": ["clip_l", "clip_g"],
    "wuerstchen": ["clip_g"],
    "stable_cascade": ["clip_g"],
    "pixart_alpha": ["t5xxl"],
}


def compare_denoisers(live: DiffusionModule, unet: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    own = live.part("denoiser").eval()
    config = own.config
    noisy = torch.randn(1, config.in_channels, 16, 16, generator=generator)
    inputs = (noisy, torch.tensor([500]), torch.randn(1, 7, config.cross_attention_dim, generator=generator))
    more = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more = {"text_embeds": torch.randn(1, pooled, generator=generator), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        ours, theirs = (net(*inputs, added_cond_kwargs=more).sample for net in (own, unet.eval()))
    torch.testing.assert_close(theirs, ours, **LIKE_LIVE)


def compare_words(cell: Cell, live: DiffusionModule, file: Path) -> None:
    """diffusers reads the new word, and encodes a prompt with it as OTL does."""
    pipe = STOCK[cell.family].from_pretrained(cell.folder / "model", safety_checker=None)
    tensors = load_file(file)
    if cell.family == "sdxl":
        for key, encoder, tokenizer in (
            ("clip_l", "text_encoder", "tokenizer"),
            ("clip_g", "text_encoder_2", "tokenizer_2"),
        ):
            pipe.load_textual_inversion(
                tensors[key], token="<cat>", text_encoder=getattr(pipe, encoder), tokenizer=getattr(pipe, tokenizer)
            )
    else:
        pipe.load_textual_inversion(str(file), token="<cat>")
    encoded: tuple[Tensor, ...] = pipe.encode_prompt(
        "a photo of a <cat>", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    with torch.no_grad():
        ours = live.encode_prompt(["a photo of a <cat>"])["hidden"]
    torch.testing.assert_close(encoded[0], ours, **LIKE_LIVE)


def test_a_run_of_every_family_is_typed_as_a_command():
    assert TYPED.keys() == FAMILIES.keys() and set(TYPED.items()) <= set(CELLS)
