"""Which images there are, how large, with which captions; and what is wrong with them. Reads headers only."""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from otl import rng
from otl.config import Broken, CaptionOptions, ConceptType, Data, Inpaint, SettingsError
from otl.datamodules import captions, masks
from otl.datamodules.files import content_hash
from otl.datamodules.images import UNREADABLE, reason, upright_size
from otl.types import Problem, Sample

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
UNSUPPORTED = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng")
LABELS = (masks.LABEL, "-condlabel")  # ends of stems: not images to train on
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what the last bytes of a whole file contain
TAIL = 4096  # bytes
THREADS = 16  # headers wait for the disk, not for the processor


@dataclass
class Source:
    """One folder to search."""

    key: str  # the setting that names it
    concept: str
    folder: Path | None  # None: not given
    prompt: str | None
    captions: CaptionOptions
    type: ConceptType
    repeats: int
    weight: float
    generate: int = 0  # images that are drawn where there are fewer

    @property
    def validation(self) -> bool:
        return self.type == ConceptType.validation


@dataclass
class Broke:
    """A file that is no image, or not all of one."""

    path: Path
    reason: str


def scan(data: Data | DictConfig, inpaint: Inpaint | None = None) -> tuple[list[Sample], list[Problem]]:
    """All images of `data.path` and `data.concepts`, by concept and then by name.

    Args:
        data: the settings.
        inpaint: where masks come from; None: there are none.

    Returns:
        The samples, and what is wrong: fatal where the run cannot or must not go on.

    Raises:
        SettingsError: a folder below cannot be searched.
    """
    # Large photographs are no bombs; what Pillow takes for a certain one it refuses, and that is reported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = [_scan_source(source, inpaint) for source in sources(data)]
    samples = [sample for each, _, _ in found for sample in each]
    broken = [broke for _, each, _ in found for broke in each]
    problems = [problem for _, _, each in found for problem in each]
    if not found:
        problems.append(
            Problem("data.path", "no images are given; set data.path=FOLDER or data.concepts.NAME.path=FOLDER")
        )
    samples, held_out = _hold_out(samples, data.validation_share)
    problems += _broken(broken, fatal=data.broken_images == Broken.error)
    samples, uncaptioned = captions.uncaptioned(samples, data.missing_captions, captions.options(data))
    problems += uncaptioned + held_out + _duplicates(samples)
    if inpaint is not None:
        problems += masks.lacking(samples, inpaint)
    if samples and all(sample.validation for sample in samples):
        problems.append(Problem("data.path", "every image is for validation, none to train on; add some"))
    return samples, problems


def sources(data: Data | DictConfig) -> list[Source]:
    """The folders that the settings name."""
    settings: Any = data if OmegaConf.is_config(data) else OmegaConf.structured(data)
    found, options = [], captions.options(settings)
    if settings.path is not None:
        folder = _folder(settings.path)
        found.append(
            Source(
                "data.path", "data", folder, settings.prompt, options["data"], ConceptType.train, repeats=1, weight=1.0
            )
        )
    for name, concept in settings.concepts.items():
        given = None if OmegaConf.is_missing(concept, "path") else concept.path
        found.append(
            Source(
                f"data.concepts.{name}.path",
                str(name),
                _folder(given),
                concept.prompt,
                options[str(name)],
                ConceptType(concept.type),
                repeats=concept.repeats,
                weight=concept.loss_weight,
                generate=concept.generate,
            )
        )
    return found


def _folder(path: str | None) -> Path | None:
    return Path(path).expanduser() if path else None


def _scan_source(source: Source, inpaint: Inpaint | None) -> tuple[list[Sample], list[Broke], list[Problem]]:
    unusable = _unusable(source)
    if source.generate and source.folder is not None and not source.folder.exists():
        return [], [], _undrawn(source, 0)
    if unusable:
        return [], [], [Problem(source.key, unusable)]
    assert source.folder is not None
    files = _files(source.folder, [] if inpaint is None else masks.folders(inpaint))
    wanted = [path for path in files if path.suffix.lower() in EXTENSIONS]
    problems = _unsupported(source, files) + _undrawn(source, len(wanted))
    if not wanted and not source.generate:
        accepted = ", ".join(extension[1:] for extension in EXTENSIONS)
        problems.append(Problem(source.key, f"{source.folder} holds no images; accepted are {accepted}"))
    Image.init()  # not in several threads at once
    with ThreadPoolExecutor(THREADS) as pool:
        read = list(pool.map(lambda path: _read(path, source), wanted))
    samples = [each for each in read if isinstance(each, Sample)]
    if inpaint is not None:
        samples, unfit = masks.attached(samples, source.folder, inpaint)
        problems += unfit
    if wanted and not samples:
        problems.append(Problem(source.key, f"none of the {len(wanted)} images in {source.folder} can be read"))
    return samples, [each for each in read if isinstance(each, Broke)], problems


def _unusable(source: Source) -> str | None:
    """Why nothing can be searched there."""
    if source.folder is None:
        return f"no folder is given; set {source.key}=FOLDER"
    if not source.folder.exists():
        return f"{source.folder} does not exist (looked for {source.folder.absolute()}); give a folder of images"
    if not source.folder.is_dir():
        return f"{source.folder} is a file; give the folder it is in"
    return None


def _files(folder: Path, without: list[Path]) -> list[Path]:
    """All files in it and below that may be images to train on, in an order that no file system decides."""
    found: list[Path] = []
    seen = {os.path.realpath(each) for each in without}  # a link may lead back up
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_unsearchable):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    images = [path for path in found if not path.stem.endswith(LABELS)]
    return sorted(images, key=lambda path: _natural(path.relative_to(folder).as_posix()))


def pictures(folder: Path) -> list[Path]:
    """The files in a folder and below that are taken for images to train on."""
    return [path for path in _files(folder, []) if path.suffix.lower() in EXTENSIONS]


def _undrawn(source: Source, count: int) -> list[Problem]:
    """That the rest of a concept's images is drawn before the run."""
    if count >= source.generate:
        return []
    message = (
        f"{_count([None] * (source.generate - count), 'image')} will be drawn before the run, as many as are missing"
    )
    return [Problem(source.key, message + "; this plan knows those that are there", fatal=False)]


def _unsearchable(error: OSError) -> None:
    raise SettingsError(f"{error.filename}: cannot be searched for images ({error.strerror}); mend it or move it away")


def _natural(name: str) -> tuple[list[str | int], str]:
    """img2 before img10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _read(path: Path, source: Source) -> Sample | Broke:
    """One image's header and captions."""
    try:
        with Image.open(path) as image:
            size = upright_size(image)
            if _ends_early(path, image.format):
                image.load()  # raises if pixels are missing
        texts = captions.found(path, source.captions, prompt=source.prompt)
    except captions.Unreadable as error:
        return Broke(path, str(error))
    except UNREADABLE as error:
        return Broke(path, "it is empty" if path.stat().st_size == 0 else reason(error))
    return Sample(
        path,
        size,
        texts or [""],
        concept=source.concept,
        repeats=1 if source.validation else source.repeats,
        weight=source.weight,
        validation=source.validation,
        prior=source.type == ConceptType.prior,
        caption_missing=not texts,
        bytes=path.stat().st_size,
    )


def _ends_early(path: Path, format: str | None) -> bool:
    """Whether the file may have been cut off, as an interrupted copy is."""
    if format not in ENDS:
        return False
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        return ENDS[format] not in file.read()


def _hold_out(samples: list[Sample], share: float) -> tuple[list[Sample], list[Problem]]:
    """Mark a share for validation, chosen by content: more images do not move the earlier ones."""
    if share <= 0:
        return samples, []
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda sample: content_hash(sample.path), samples)
        chosen = [rng.uniform("validation", content) < share for content in hashes]
    marked = [replace(sample, validation=True, repeats=1) if hold else sample for sample, hold in zip(samples, chosen)]
    if any(chosen) or not samples:
        return marked, []
    message = f"{share} of {len(samples)} images came out as none held out; raise it, or give a validation concept"
    return marked, [Problem("data.validation_share", message, fatal=False)]


def _broken(broken: list[Broke], *, fatal: bool) -> list[Problem]:
    if not broken:
        return []
    what = "mend or remove them, or leave them out with data.broken_images=skip" if fatal else "they are left out"
    details = [f"{broke.path}: {broke.reason}" for broke in broken]
    return [Problem("data.broken_images", f"{_count(broken, 'file')} cannot be read; {what}", fatal, details)]


def _unsupported(source: Source, files: list[Path]) -> list[Problem]:
    others = [path for path in files if path.suffix.lower() in UNSUPPORTED]
    if not others:
        return []
    message = f"{_count(others, 'file')} of a kind that is not read, and left out; convert to png or jpg"
    return [Problem(source.key, message, False, [str(path) for path in others])]


def _duplicates(samples: list[Sample]) -> list[Problem]:
    """Images with the same bytes; only files of one length are compared."""
    details = []
    for same_length in _groups((sample.bytes, sample.path) for sample in samples):
        for same in _groups((content_hash(path), path) for path in same_length):
            details.append(" = ".join(map(str, same)))
    if not details:
        return []
    message = f"{_count(details, 'image')} in the dataset more than once, and trained on as often"
    return [Problem("data.path", message, False, details)]


def _groups(pairs: Iterable[tuple[Any, Path]]) -> Iterator[list[Path]]:
    """The paths that share a label, where there are at least two."""
    by_label = defaultdict(list)
    for label, path in pairs:
        by_label[label].append(path)
    return (paths for paths in by_label.values() if len(paths) > 1)


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}" + ("s" if len(things) != 1 else "")
