"""Write masks for the images of a dataset."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from otl.datamodules import images, mask_files
from otl.formats.files import whole
from otl.tasks import editing
from otl.tasks.run import run_dir
from otl.tools import shaping
from otl.types import Masker, Size

log = logging.getLogger(__name__)

Mode = Literal["fill", "replace", "add", "subtract", "blend"]
ALPHA = 0.5
WHITE = 0.5  # above it an inpainting model paints


def mask(
    settings: DictConfig,
    *,
    mode: Mode = "fill",
    invert: bool = False,
    grow: int = 0,
    smooth: float = 0.0,
    unmasked: float = 0.0,
    alpha: float | None = None,
    batch_size: int = 4,
    folder: Path | None = None,
) -> None:
    """Mask every image that the mode says; mask.csv in the run's folder has each, with how much of it is white.

    Args:
        mode: fill (only images without a mask), replace, add (white where either mask is), subtract (black where the
            new one is white) or blend.
        invert: whether white is what the masker did not find.
        grow: pixels by which white reaches further; below 0 it draws back.
        smooth: standard deviation of the blur of the edges, pixels; 0: they are sharp.
        unmasked: grey that every pixel has at least, 0 black to 1 white.
        alpha: share of the new mask in a blend, 0..1; None: a half.
        batch_size: images masked at once.
        folder: of the run; None: the one that Hydra made.

    Raises:
        SettingsError: there are no images, or the masker cannot be loaded.
        RunEnded: some images failed; names them.
    """
    brush = Brush(mode, invert, grow, smooth, unmasked, ALPHA if alpha is None else alpha)
    found = editing.found(settings)
    table = (run_dir() if folder is None else folder) / "mask.csv"
    record = editing.Record(table, "mask", "white", overwrite=settings.output.overwrite)
    todo, empty = wanted(editing.alone(found, written, record), mode, record), 0
    if todo:
        masker: Masker = editing.tool(settings.masker, settings.trainer)
        for batch in editing.batches(todo, record, size=batch_size, data=settings.data):
            whites = masker.masks([picture for _, picture in batch])
            for (item, _), white in zip(batch, whites, strict=True):
                with record.attempt(item.path):
                    made = brush.drawn(white, old(item, Size(*white.shape)))
                    share = (made > WHITE).mean()
                    write(written(item), made)
                    record.written(item.path, written(item), f"{share:.4f}")
                    empty += share == 0
    if empty:
        log.warning(f"{empty} masks have no white: 0.0000 stands beside them in {record.file}")
    record.close()


@dataclass(frozen=True)
class Brush:
    """How a mask is made of what the masker found; the arguments of `mask`."""

    mode: Mode
    invert: bool
    grow: int
    smooth: float
    unmasked: float
    alpha: float

    def drawn(self, white: np.ndarray, old: np.ndarray | None) -> np.ndarray:
        """Bool [h, w] -> float32 [h, w] in 0..1.

        Args:
            white: where the masker found something.
            old: float32 [h, w] in 0..1, the mask that is there; None: there is none.
        """
        white = shaping.grown(white ^ self.invert, self.grow)
        new = shaping.smoothed(white, self.smooth)
        made = new if old is None else shaping.combined(old, new, self.mode, self.alpha)
        return np.maximum(made, np.float32(self.unmasked))


def written(item: editing.Found) -> Path:
    """Where the mask of an image goes: beside it, or into a folder of masks, under its name and in its subfolder."""
    folder = item.source.masks.folder
    if folder is None:
        return item.path.with_name(f"{item.path.stem}{mask_files.LABEL}.png")
    return (folder / item.path.relative_to(item.root)).with_suffix(".png")


def there(item: editing.Found) -> Path | None:
    """The mask file that training would read."""
    return mask_files.find(item.path, item.root, item.source.masks.folder)


def old(item: editing.Found, size: Size) -> np.ndarray | None:
    """The mask that is there, float32 [h, w] in 0..1 in the image's size.

    Raises:
        ValueError: it has another shape than the image.
    """
    file = there(item)
    if file is None:
        return None
    grey = images.grey(file)
    own = Size(grey.height, grey.width)
    if not mask_files.fits(own, size):
        raise ValueError(f"{file}: {own} (height x width) does not have the shape of the image, {size}")
    return np.asarray(grey.resize((size.w, size.h), Image.Resampling.BILINEAR), np.float32) / 255


def wanted(items: list[editing.Found], mode: Mode, record: editing.Record) -> list[editing.Found]:
    """The images that the mode is about."""
    todo = []
    for item in items:
        has_one = there(item) is not None
        if mode == "fill" and has_one:
            record.left(item.path, "masked already")
        elif mode == "subtract" and not has_one:
            record.left(item.path, "no mask to subtract from")
        else:
            todo.append(item)
    return todo


def write(file: Path, mask: np.ndarray) -> None:
    """Float [h, w] in 0..1 -> a grey PNG, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as aside:
        Image.fromarray((mask * 255).round().astype(np.uint8)).save(aside, "PNG")
