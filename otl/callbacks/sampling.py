"""Pictures drawn during training and at its end, always from the same prompts and seeds."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import nn

from otl.callbacks import randomness
from otl.callbacks.backups import goes_on
from otl.callbacks.sheet import sheet
from otl.callbacks.timing import Steps, due, paused
from otl.config import SampleOptions, SettingsError
from otl.formats.files import whole
from otl.modules import inpainting
from otl.modules.drawing import to_pictures
from otl.types import Size

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

FOLDER = "samples"
BEFORE_AFTER = "before-after.png"
GIVEN = "given"  # what a column is called that shows what was painted in
SLUG = 40  # characters of the prompt in a file's name


class Sampling(Callback):
    """Draws every prompt with every seed, by the average where one is kept. The training does not notice.

    In `<run>/samples`: a folder of pictures and a contact sheet for each step, a .json with the exact call, and
    `before-after.png`, the first beside the last.

    Args:
        every: optimizer steps between drawings; None: only before and after the training.
        first: whether to draw before the first step too; without it there is no before-after.png.
    """

    def __init__(self, every: int | None = 500, first: bool = True) -> None:
        self.every, self.first = every, first
        self._steps = Steps()
        self._drawn_step: int | None = None
        self._canvases: list[inpainting.Canvas] | None = None  # one for each prompt, where the model paints in pictures

    def setup(self, trainer: Trainer, pl_module: DiffusionModule, stage: str) -> None:
        """Raises SettingsError: `every` is below 1, or there are prompts and no seeds."""
        if self.every is not None and self.every < 1:
            raise SettingsError(f"callbacks.sampling.every={self.every}: give at least 1, or null for the end only")
        if pl_module.sample_options.prompts and not pl_module.sample_options.seeds:
            raise SettingsError("sample.seeds is empty: give at least one, such as [0]")
        if not pl_module.sample_options.prompts:
            log.info("no pictures will be drawn: sample.prompts is empty")

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._steps.start(trainer)
        self._drawn_step = None
        if self.first if trainer.global_step == 0 else self._lacks(trainer, pl_module):
            self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps.advanced(trainer) and due(trainer.global_step, self.every):
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        if self._drawn_step != trainer.global_step:
            self._draw(trainer, pl_module)
        if trainer.is_global_zero and pl_module.sample_options.prompts and self.first:
            before_after(pl_module.run_dir / FOLDER, trainer.global_step)

    def complete(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Where the run was killed after its last step, and before its last pictures were there."""
        if drawn(module, trainer.global_step):
            self._drawn_step = trainer.global_step
        self.on_train_end(trainer, module)

    def _lacks(self, trainer: Trainer, module: DiffusionModule) -> bool:
        """Whether the run goes on, in its own folder, from a step at which it failed to write its pictures."""
        step = trainer.global_step
        return due(step, self.every) and goes_on(trainer, module.run_dir) and not drawn(module, step)

    def _draw(self, trainer: Trainer, module: DiffusionModule) -> None:
        self._drawn_step = step = trainer.global_step
        options = with_guidance(module.sample_options, module)
        if not trainer.is_global_zero or not options.prompts:
            return
        size = Size(options.height or module.data_resolution, options.width or module.data_resolution)
        pairs = [(prompt, seed) for prompt in options.prompts for seed in options.seeds]
        canvases = self._canvases = self._canvases or canvases_of(trainer, module, size)
        with paused(trainer), randomness.kept(), evaluating(module), module.averaged():
            pictures = module.draw(
                [prompt for prompt, _ in pairs],
                [seed for _, seed in pairs],
                negative_prompt=options.negative_prompt,
                steps=options.steps,
                guidance=options.guidance,
                sampler=options.sampler,
                timestep_spacing=options.timestep_spacing,
                size=size,
                batch_size=options.batch_size,
                **({} if canvases is None else {"canvases": [each for each in canvases for _ in options.seeds]}),
            )
            given = None if canvases is None else [shown(each) for each in canvases]
            write(module.run_dir / FOLDER, step, options, size, pictures, given, average=module.average is not None)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    for name, picture in zip(names(options), pictures):
                        pixels = numpy.asarray(picture.convert("RGB"))
                        logger.experiment.add_image(f"samples/{name}", pixels, step, dataformats="HWC")
        log.info(f"step {step}: {len(pictures)} pictures in {module.run_dir / FOLDER / stem(step)}")


def drawn(module: DiffusionModule, step: int) -> bool:
    """Whether all pictures of a step are there: what is written last is."""
    return (module.run_dir / FOLDER / f"{stem(step)}.json").is_file()


def with_guidance(options: SampleOptions, module: DiffusionModule) -> SampleOptions:
    """The settings as they are drawn with: the guidance is the family's where they have none."""
    return options if options.guidance is not None else replace(options, guidance=module.guidance)


def canvases_of(trainer: Trainer, module: DiffusionModule, size: Size) -> list[inpainting.Canvas] | None:
    """What is painted in, one for each prompt: the pictures of the settings, or the first image of the dataset."""
    if not module.inpaints:
        return None
    options, data = module.sample_options, trainer.datamodule  # type: ignore[attr-defined]
    given = inpainting.canvases(options, size, data.data.background)
    if given is None:
        first = data.samples[0]
        log.info(f"pictures are painted in {first.path}, the first image; choose others with sample.image, sample.mask")
        given = [
            inpainting.first_canvas(first, size, data.data.background, options=module.inpaint_options, seed=module.seed)
        ] * len(options.prompts)
    return given


def shown(canvas: inpainting.Canvas) -> Image.Image:
    """The picture with its hole in grey."""
    return to_pictures(canvas.pixels[None] * (1 - canvas.mask))[0]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode; each back in its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def stem(step: int) -> str:
    return f"step-{step:06d}"


def names(options: SampleOptions) -> list[str]:
    """The name of each picture, prompt by prompt and seed by seed."""
    return [f"{k:02d}-{slug(p)}-seed{seed}" for k, p in enumerate(options.prompts) for seed in options.seeds]


def slug(prompt: str) -> str:
    """A prompt as part of a file name: "A photo of sks, red!" -> "a-photo-of-sks-red"."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:SLUG].strip("-_") or "empty"


def write(
    folder: Path,
    step: int,
    options: SampleOptions,
    size: Size,
    pictures: list[Image.Image],
    given: list[Image.Image] | None = None,
    *,
    average: bool,
) -> None:
    """The pictures, their contact sheet, and the call that drew them.

    Args:
        given: what was painted in, one for each prompt; None: nothing.
    """
    own = folder / stem(step)
    own.mkdir(parents=True, exist_ok=True)
    calls = []
    pairs = [(prompt, seed) for prompt in options.prompts for seed in options.seeds]
    for (prompt, seed), name, picture in zip(pairs, names(options), pictures):
        save(picture, own / f"{name}.png")
        calls.append({"file": f"{own.name}/{name}.png", "prompt": prompt, "seed": seed})
    count = len(options.seeds)
    rows = [(prompt, pictures[k * count : (k + 1) * count]) for k, prompt in enumerate(options.prompts)]
    columns = [f"seed {seed}" for seed in options.seeds]
    if given is not None:
        rows = [(prompt, [picture, *row]) for picture, (prompt, row) in zip(given, rows)]
        columns = [GIVEN, *columns]
        for k, picture in enumerate(given):
            save(picture, own / f"{k:02d}-{GIVEN}.png")
    save(sheet(rows, columns), folder / f"{own.name}.png")
    call = {
        "step": step,
        "average": average,
        "negative_prompt": options.negative_prompt,
        "steps": options.steps,
        "guidance": options.guidance,
        "sampler": options.sampler and options.sampler.value,
        "timestep_spacing": options.timestep_spacing and options.timestep_spacing.value,
        "height": size.h,
        "width": size.w,
        "batch_size": options.batch_size,
        "pictures": calls,
    }
    if given is not None:
        call |= {"image": options.image, "mask": options.mask}
        call["given"] = [f"{own.name}/{k:02d}-{GIVEN}.png" for k in range(len(given))]
    with whole(folder / f"{own.name}.json") as aside:
        aside.write_text(json.dumps(call, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def before_after(folder: Path, step: int) -> Path | None:
    """`before-after.png` of the pictures of step 0 and `step`; None, with the reason in the log, where it cannot be."""
    if not (folder / f"{stem(0)}.json").is_file():
        log.info(f"no {BEFORE_AFTER}: nothing in {folder} was drawn before the first step")
        return None
    before, after = (json.loads((folder / f"{stem(k)}.json").read_text(encoding="utf-8")) for k in (0, step))
    drawn = {"step", "average", "batch_size", "pictures", "given"}
    calls = [
        ({k: v for k, v in call.items() if k not in drawn}, [(p["prompt"], p["seed"]) for p in call["pictures"]])
        for call in (before, after)
    ]
    if calls[0] != calls[1]:
        log.warning(f"no {BEFORE_AFTER}: the sample settings are others than before the first step")
        return None
    seeds = dict.fromkeys(picture["seed"] for picture in before["pictures"])
    rows = []
    for k, prompt in enumerate(picture["prompt"] for picture in before["pictures"][:: len(seeds)]):
        for label, call in (("before", before), (f"after {step} steps", after)):
            files = [picture["file"] for picture in call["pictures"][k * len(seeds) : (k + 1) * len(seeds)]]
            opened = [Image.open(folder / file) for file in call.get("given", [])[k : k + 1] + files]
            rows.append((f"{label}: {prompt}", opened))
    columns = [GIVEN] * ("given" in before) + [f"seed {seed}" for seed in seeds]
    save(sheet(rows, columns), folder / BEFORE_AFTER)
    return folder / BEFORE_AFTER


def save(picture: Image.Image, path: Path) -> None:
    with whole(path, needs=3 * picture.width * picture.height) as aside:  # at most: a PNG is packed
        picture.save(aside, "PNG")
