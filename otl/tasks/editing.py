"""Files written beside the images of a dataset, and what became of each."""

from __future__ import annotations

import csv
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL.Image import Image

from otl.callbacks.progress import track
from otl.config import Data, RunEnded, SettingsError
from otl.datamodules import headers, images, mask_files
from otl.datamodules.bucketed import report
from otl.datamodules.headers import Limits
from otl.datamodules.index import Index
from otl.datamodules.scan import Source, sources
from otl.datamodules.sources.find import find
from otl.datamodules.sources.items import Item
from otl.datamodules.sources.places import Wanted
from otl.tasks.precision import choose, device

log = logging.getLogger(__name__)

THREADS = 4  # that decode images
LISTED = 10  # failures named on the console
NO_FOLDER = "is no folder on a disk, and files are written beside the images: give one"


class Found(NamedTuple):
    """An image of the dataset, in a folder on a disk."""

    path: Path
    item: Item
    source: Source

    @property
    def root(self) -> Path:
        """The folder that was searched."""
        assert self.source.folder is not None, "an image that was found lies in a folder"
        return self.source.folder


class Record:
    """A table of what became of every image, written line by line, so that an interruption loses nothing.

    Args:
        file: a CSV.
        columns: behind image, outcome and reason.
        overwrite: whether an earlier one may be replaced.

    Raises:
        SettingsError: there is an earlier one, and it may not.
    """

    def __init__(self, file: Path, *columns: str, overwrite: bool = False) -> None:
        if file.exists() and not overwrite:
            raise SettingsError(
                f"{file} is of an earlier run: choose another hydra.run.dir, or replace it with output.overwrite=true"
            )
        self.file, self.empty = file, [""] * len(columns)
        self.counts: Counter[str] = Counter()  # of what was written, and of what was left for each reason
        self.failures: list[str] = []
        self.lines = file.open("w", encoding="utf-8", newline="")
        self._row("image", "outcome", "reason", *columns)

    def written(self, image: Path, *more: Any) -> None:
        self.counts["written"] += 1
        self._row(image, "written", "", *more)

    def left(self, image: Path, reason: str) -> None:
        self.counts[f"left: {reason}"] += 1
        self._row(image, "left", reason, *self.empty)

    def failed(self, image: Path, error: Exception) -> None:
        reason = str(error).removeprefix(f"{image}: ")
        self.failures.append(f"{image}: {reason}")
        self._row(image, "failed", reason, *self.empty)

    @contextmanager
    def attempt(self, image: Path) -> Iterator[None]:
        """What goes wrong with one image is recorded, and the others go on."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.failed(image, error)

    def close(self) -> None:
        """Say how many were written, left and failed.

        Raises:
            RunEnded: some failed; names them.
        """
        self.lines.close()
        for outcome, count in self.counts.items():
            log.info(f"{count} {outcome}")
        log.info(f"each in {self.file}")
        if self.failures:
            more = [f"  and {len(self.failures) - LISTED} more, in {self.file}"] * (len(self.failures) > LISTED)
            listed = [f"  {failure}" for failure in self.failures[:LISTED]]
            raise RunEnded(
                "\n".join([f"{len(self.failures)} image{'s' * (len(self.failures) > 1)} failed:", *listed, *more])
            )

    def _row(self, *cells: Any) -> None:
        csv.writer(self.lines).writerow(cells)
        self.lines.flush()


def found(settings: DictConfig) -> list[Found]:
    """Every image of the dataset once, also where two of its folders hold it; no mask is one.

    Raises:
        SettingsError: there is none, or it does not lie in a folder on a disk.
    """
    data: Data = OmegaConf.to_object(settings.data)  # type: ignore[assignment]
    without = [each.folder for each in mask_files.options(data).values() if each.folder is not None]
    everything: dict[Path, Found] = {}
    for source in sources(data):
        for item in items_of(source, data, without):
            if not isinstance(item.file, Path):
                raise SettingsError(f"{source.key}: {item.file} {NO_FOLDER}")
            real = item.file.parent.resolve() / item.file.name
            everything.setdefault(real, Found(item.file, item, source))
    return list(everything.values())


def items_of(source: Source, data: Data, without: list[Path]) -> list[Item]:
    """The images of one concept."""
    if source.path is None or source.folder is None or not source.folder.is_dir():
        raise SettingsError(f"{source.key}: {source.path} {NO_FOLDER}")
    wanted = Wanted(source.path, source.key, source.recursive, source.columns, without)
    index = Index(Path(data.cache_dir).expanduser(), source.path)
    listed = find(wanted, index, Limits(data.max_megapixels))
    for problem in listed.problems:
        if problem.fatal:
            raise SettingsError(report(problem))
        log.warning(report(problem))
    for item in listed.items:
        if item.flaw:
            log.warning(f"{item.file}: {item.flaw}")
    return [item for item in listed.items if not item.flaw]


def tool(options: DictConfig, trainer: DictConfig) -> Any:
    """A captioner or masker, loaded where the settings of the Trainer say, in the dtype of its precision."""
    made = instantiate(options, _convert_="all")
    precision = choose(trainer.precision, accelerator=trainer.accelerator, devices=trainer.devices)
    made.load(device(trainer), precision.autocast or torch.float32)
    return made


def alone(items: Iterable[Found], target: Callable[[Found], Path], record: Record) -> list[Found]:
    """The images without those whose file would be another's too, as for dog.jpg and dog.png."""
    owners: dict[Path, Path] = {}
    kept = []
    for item in items:
        owner = owners.setdefault(target(item), item.path)
        if owner == item.path:
            kept.append(item)
        else:
            record.left(item.path, "another image of that name has the file")
    return kept


def batches(items: list[Found], record: Record, *, size: int, data: Data) -> Iterator[list[tuple[Found, Image]]]:
    """The images in batches, decoded ahead; those that cannot be decoded are recorded and left out."""
    decoded = ahead(items, lambda item: decode(item.path, data), depth=2 * size)
    shown = track(decoded, "images", len(items))
    while some := list(islice(shown, size)):
        batch = []
        for item, picture in some:
            with record.attempt(item.path):
                batch.append((item, picture.result()))
        if batch:
            yield batch


def decode(path: Path, data: Data) -> Image:
    """An image as it is seen.

    Raises:
        SettingsError: training would take it for broken too.
    """
    flaw = headers.read(path, Limits(data.max_megapixels)).flaw
    if flaw:
        raise SettingsError(flaw)
    return images.load(path, data.background)


def ahead(
    items: Iterable[Found], function: Callable[[Found], Image], *, depth: int
) -> Iterator[tuple[Found, Future[Image]]]:
    """Each item with what the function makes of it, `depth` of them under way at a time."""
    waiting: deque[tuple[Found, Future[Image]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > depth:
                yield waiting.popleft()
        yield from waiting
