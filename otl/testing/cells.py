"""A family with a method: the settings of a command, the modules that they make, and the runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from PIL import Image

from otl.callbacks.export import results
from otl.cli import PluginConf, spelled_out
from otl.config import SettingsError, register
from otl.mistakes import compose_settings
from otl.modules.base import DiffusionModule
from otl.tasks.run import build_module, build_skeleton
from otl.tasks.train import train

WORD = "<cat>"  # the placeholder of each embedding here
EMBEDDING = f"+method.embeddings.cat={{placeholder: '{WORD}', vectors: 2}}"
METHODS = {  # as a command chooses them, small
    "lora": ("method=lora", "method.rank=4"),
    "dora": ("method=dora", "method.rank=4"),
    "loha": ("method=loha", "method.rank=4"),
    "lokr": ("method=lokr", "method.rank=2", "method.factor=4"),
    "oft": ("method=oft", "method.block_size=8"),
    "finetune": ("method=finetune",),
    "embedding": ("method=embedding", EMBEDDING),
    "lora + embedding": ("method=lora", "method.rank=4", EMBEDDING),
    "inpaint": ("method=inpaint",),
}
PICTURES = {"red": f"a {WORD} in front of a red wall", "green": f"a photo of a {WORD}", "blue": f"a {WORD} by the sea"}
SMALLEST = 64  # pixels per side that a run trains at, at least
STEPS, STOP = 4, 2  # optimizer steps of a run, and where it is gone on with


class Names(NamedTuple):
    """What the programs that read a family's files look up."""

    lora: Callable[[str], str]  # the path of the denoiser's layer -> what its keys in a LoRA file begin with
    embedding: Sequence[str]  # the keys of an embedding's file


class Cell:
    """One family with one method.

    Args:
        model: the words of a command that choose a tiny checkpoint: ["model=example", "model.checkpoint=tiny/"].
        method: those that choose the method, as `METHODS` has them.
        folder: for what it writes.
        pictures: folder of at least three pictures, with captions that have the placeholder; None: drawn ones.
        names: by which others read its files; None: those that the family itself declares.
    """

    def __init__(
        self,
        model: Sequence[str],
        method: Sequence[str],
        folder: Path,
        *,
        pictures: Path | None = None,
        names: Names | None = None,
    ) -> None:
        self.model, self.method, self.folder, self.names = list(model), list(method), folder, names
        self.pictures = pictures or draw_pictures(folder / "pictures")
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.loaded: Any = None  # the pipeline, to be copied: reading tokenizers takes longer than most checks

    def settings(self, *more: str, method: Sequence[str] | None = None) -> DictConfig:
        """Those of a command with further words.

        Args:
            method: another one.
        """
        words = self.words(*more, method=method)
        if words not in self.composed:
            self.composed[words] = composed(words)
        return self.composed[words]

    def words(self, *more: str, method: Sequence[str] | None = None) -> tuple[str, ...]:
        """Of a command."""
        return (
            *self.model,
            *(self.method if method is None else method),
            f"data.path={self.pictures}",
            f"data.cache_dir={self.folder / 'cache'}",
            "data.batch_size=2",
            "data.workers=0",
            "logger=none",
            "output.dtype=fp32",
            "optimizer.lr=1e-3",
            f"trainer.max_steps={STEPS}",
            f"callbacks.checkpoint.every={STOP}",
            f"sample.prompts=['a photo of a {WORD}']",
            "sample.steps=2",
            "callbacks.sampling.every=null",
            "callbacks.sampling.first=false",
            *more,
        )

    def side(self) -> int:
        """Pixels per side that a run trains at."""
        return max(SMALLEST, self.made().bucket_step)

    def made(self, *more: str, method: Sequence[str] | None = None) -> DiffusionModule:
        """A new module with its method, nothing loaded."""
        module = build_module(self.settings(*more, method=method))
        if any(word.startswith("model.") for word in more):  # another checkpoint
            return module

        def load_pipeline(without: Sequence[str] = ()) -> Any:
            if without:
                return type(module).load_pipeline(module, without)
            if self.loaded is None:
                self.loaded = type(module).load_pipeline(module)
            return copied(self.loaded, module.part_names)

        module.load_pipeline = load_pipeline  # type: ignore[method-assign]
        return module

    def module(self, *more: str, method: Sequence[str] | None = None) -> DiffusionModule:
        """The same with weights, as before the first step."""
        module = self.made(*more, method=method)
        module.configure_model()
        return module

    def refusal(self) -> str:
        """Why the method cannot be with the family, which is told before any weight is loaded; empty: it can."""
        try:
            build_skeleton(self.settings())
        except SettingsError as error:
            return str(error)
        return ""

    def run(self, name: str, *more: str) -> Path:
        """Train in a folder of that name."""
        folder = self.folder / name
        folder.mkdir()
        train(self.settings(*self.sized(), *more), folder)
        return folder

    def sized(self) -> list[str]:
        """The words of a run's size."""
        return [f"data.resolution={self.side()}"]

    def result(self, run: Path) -> Path:
        """The file or folder that a run is for."""
        (found,) = results(run / self.settings().output.name)
        return found


def composed(words: Sequence[str]) -> DictConfig:
    """The settings of a command line; those of installed plugins are known."""
    register()
    Plugins.instance().register(PluginConf)
    return compose_settings(spelled_out(words), name="config")


def copied(pipeline: Any, parts: Sequence[str]) -> Any:
    """A pipeline with networks of its own."""
    other = copy.copy(pipeline)
    for name in parts:
        setattr(other, name, copy.deepcopy(getattr(pipeline, name)))
    return other


def draw_pictures(folder: Path) -> Path:
    """Pictures of random pixels with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, caption) in enumerate(PICTURES.items()):
        pixels = torch.rand(160, 192, 3, generator=torch.Generator().manual_seed(seed)) * 255
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder
