"""Write captions for the images of a dataset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from otl.config import CaptionSource
from otl.datamodules import captions
from otl.formats.files import whole
from otl.tasks import editing
from otl.tasks.run import run_dir
from otl.types import Captioner

Mode = Literal["fill", "replace", "append", "prepend"]
SEPARATOR = ", "
WRITTEN = (CaptionSource.manifest, CaptionSource.file, CaptionSource.json)  # for the one image


def caption(
    settings: DictConfig,
    *,
    mode: Mode = "fill",
    prefix: str = "",
    suffix: str = "",
    separator: str | None = None,
    batch_size: int = 4,
    folder: Path | None = None,
) -> None:
    """Caption every image that the mode says; caption.csv in the run's folder has each, with what was there before.

    Args:
        mode: fill (only images without a caption), replace, append or prepend (to every caption that is there).
        prefix, suffix: put before and behind what the captioner writes, as they are.
        separator: between a caption that is there and what is added; None: a comma and a space.
        batch_size: images captioned at once.
        folder: of the run; None: the one that Hydra made.

    Raises:
        SettingsError: there are no images, or the captioner cannot be loaded.
        RunEnded: some images failed; names them.
    """
    pen = Pen(mode, prefix, suffix, SEPARATOR if separator is None else separator)
    found = editing.found(settings)
    table = (run_dir() if folder is None else folder) / "caption.csv"
    record = editing.Record(table, "caption", "before", overwrite=settings.output.overwrite)
    there = captions_there(editing.alone(found, file_of, record), mode, record)
    if there:
        captioner: Captioner = editing.tool(settings.captioner, settings.trainer)
        todo = [item for item in found if item.path in there]
        for batch in editing.batches(todo, record, size=batch_size, data=settings.data):
            texts = captioner.captions([picture for _, picture in batch])
            for (item, _), text in zip(batch, texts, strict=True):
                with record.attempt(item.path):
                    before = there[item.path]
                    lines = pen.lines(before, text)
                    write(file_of(item), lines)
                    record.written(item.path, "\n".join(lines), "\n".join(before))
    record.close()


@dataclass(frozen=True)
class Pen:
    """How a caption is made of what the captioner wrote; the arguments of `caption`."""

    mode: Mode
    prefix: str
    suffix: str
    separator: str

    def lines(self, before: list[str], text: str) -> list[str]:
        """The captions of an image, one a line.

        Args:
            before: those that are there.
            text: what the captioner wrote, which becomes one line.

        Raises:
            ValueError: it wrote nothing.
        """
        words = " ".join(text.split())
        if not words:
            raise ValueError("the captioner had nothing to say")
        new = f"{self.prefix}{words}{self.suffix}"
        match self.mode:
            case "append":
                return [f"{line}{self.separator}{new}" for line in before] or [new]
            case "prepend":
                return [f"{new}{self.separator}{line}" for line in before] or [new]
        return [new]


def file_of(item: editing.Found) -> Path:
    """Where training reads an image's captions, or will."""
    suffix = item.source.captions.suffix
    longer = item.path.with_name(item.path.name + suffix)
    shorter = item.path.with_name(item.path.stem + suffix)
    return longer if longer.is_file() and not shorter.is_file() else shorter


def captions_there(items: list[editing.Found], mode: Mode, record: editing.Record) -> dict[Path, list[str]]:
    """The images to caption, with the captions that they have."""
    there = {}
    for item in items:
        with record.attempt(item.path):
            before = written(item, item.source.captions.sources)
            first = item.source.captions.sources.index(CaptionSource.file)
            if before and mode == "fill":
                record.left(item.path, "captioned already")
            elif written(item, item.source.captions.sources[:first]):
                record.left(item.path, "data.captions.sources has a caption for it before file")
            else:
                there[item.path] = before
    return there


def written(item: editing.Found, sources: list[CaptionSource]) -> list[str]:
    """The captions that some sources have, those left out that are no more than a name or a prompt."""
    options = replace(item.source.captions, sources=[source for source in sources if source in WRITTEN])
    return captions.found(item.item, options, prompt=None, given=item.item.given)


def write(file: Path, lines: list[str]) -> None:
    with whole(file) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
