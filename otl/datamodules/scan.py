"""Which images there are, how large, with which captions; and what is wrong with them. Reads headers only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING
from PIL import Image

from otl import rng
from otl.config import Broken, CaptionOptions, Concept, ConceptType, Data, Inpaint, SettingsError
from otl.datamodules import captions, findings, headers, mask_files, texts
from otl.datamodules.files import Remote, content_hash, stamp
from otl.datamodules.findings import Broke
from otl.datamodules.headers import Header, Limits
from otl.datamodules.index import Index
from otl.datamodules.mask_files import MaskFiles
from otl.datamodules.sources.columns import Chosen
from otl.datamodules.sources.find import find
from otl.datamodules.sources.folder import on_disk
from otl.datamodules.sources.items import Item, pictures
from otl.datamodules.sources.places import Wanted
from otl.datamodules.sources.table import Cell
from otl.trust import public
from otl.types import File, Problem, Sample, Size
from otl.urls import is_url

log = logging.getLogger(__name__)

THREADS = 16  # headers wait for the disk or the network, not for the processor
NOTHING = "no images are given; set data.path=FOLDER or data.concepts.NAME.path=FOLDER"
NOTHING_NEW = (
    "all images are of type regularisation, prior or validation, so that the model would learn nothing new: give what "
    "it is to learn as a concept of type=train, or as data.path"
)
TOGETHER = 32  # headers that a thread reads in a row: handing out one at a time costs more than reading it


@dataclass
class Source:
    """One concept's images, still to be found."""

    key: str  # the setting that names them
    concept: str
    path: str | None  # None: not given
    prompt: str | None
    captions: CaptionOptions
    masks: MaskFiles
    type: ConceptType = ConceptType.train
    weight: float = 1.0
    generate: int = 0  # images that are drawn where there are fewer
    recursive: bool = True
    columns: Chosen = field(default_factory=Chosen)
    validation_share: float = 0.0

    @property
    def validation(self) -> bool:
        return self.type == ConceptType.validation

    @property
    def teaches(self) -> bool:
        """Whether there is something to learn from its images, beside what is only to be kept or measured."""
        return self.type == ConceptType.train

    @property
    def folder(self) -> Path | None:
        """Where it would be on a disk."""
        return None if self.path is None or is_url(self.path) else Path(self.path).expanduser()


@dataclass(slots=True)
class Read:
    """One image that can be trained on."""

    sample: Sample
    header: Header


@dataclass
class Scanned:
    """What one source came to."""

    whole: list[Read] = field(default_factory=list)
    broken: list[Broke] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def scan(
    data: Data, inpaint: Inpaint | None = None, undrawn: Sequence[Sample] = ()
) -> tuple[list[Sample], list[Problem]]:
    """All images of `data.path` and `data.concepts`, by concept and then in the order of their source.

    Args:
        data: the settings.
        inpaint: where masks come from; None: there are none.
        undrawn: class images that are still to be drawn, counted as if they were there.

    Returns:
        The samples, and what is wrong: fatal where the run cannot or must not go on.

    Raises:
        SettingsError: a folder below cannot be searched.
    """
    wanted = sources(data)
    Image.preinit()  # before `init`: else every photograph is offered to rare formats first
    Image.init()  # not in several threads at once
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is said with its name, or harmless
        found = [_scan_source(source, data, inpaint) for source in wanted]
    samples = [read.sample for each in found for read in each.whole]
    all_headers = [read.header for each in found for read in each.whole]
    problems = [problem for each in found for problem in each.problems]
    if not found:
        problems.append(Problem("data.path", NOTHING))
    problems += findings.broken([broke for each in found for broke in each.broken], data.broken_images)
    problems += findings.undecoded(data)
    problems += findings.misnamed(samples, all_headers) + findings.duplicates(samples, all_headers)
    samples, uncaptioned = captions.uncaptioned(samples, data.missing_captions, captions.options(data))
    samples += undrawn
    problems += uncaptioned + texts.malformed(samples, texts.writers(data))
    problems += mask_files.unused(data, inpaint)
    if inpaint is not None:
        problems += mask_files.lacking(samples, mask_files.options(data), inpaint)
    if samples and all(sample.validation for sample in samples):
        problems.append(Problem("data.path", "every image is for validation, none to train on; add some"))
    elif samples and not any(source.teaches for source in wanted):
        problems.append(Problem("data.concepts", NOTHING_NEW))
    return samples, problems


def sources(data: Data) -> list[Source]:
    """Where the settings say that there are images."""
    found, options, masks = [], captions.options(data), mask_files.options(data)
    if data.path is not None:
        source = Source("data.path", "data", data.path, data.prompt, options["data"], masks["data"])
        found.append(replace(source, validation_share=data.validation_share))
    for name, concept in data.concepts.items():
        if concept.enabled:
            source = _of_concept(name, concept, options[name], masks[name])
            share = data.validation_share if concept.validation_share is None else concept.validation_share
            # Class images are there to be trained on: what is measured is how well the others are learned.
            kept = source.type == ConceptType.regularisation
            found.append(replace(source, validation_share=0.0 if kept else share))
    return found


def _of_concept(name: str, concept: Concept, options: CaptionOptions, masks: MaskFiles) -> Source:
    return Source(
        f"data.concepts.{name}.path",
        name,
        None if concept.path == MISSING else concept.path,
        concept.prompt,
        options,
        masks,
        concept.type,
        weight=concept.loss_weight,
        generate=concept.generate,
        recursive=concept.recursive,
        columns=Chosen(concept.image_column, concept.caption_column, concept.mask_column),
    )


def count_pictures(folder: Path) -> int:
    """The files in a folder and below that are taken for images to train on."""
    return len(pictures(on_disk(folder, recursive=True)))


def _scan_source(source: Source, data: Data, inpaint: Inpaint | None) -> Scanned:
    if source.generate and source.folder is not None and not source.folder.exists():
        return Scanned(problems=findings.undrawn(source.key, source.generate))
    if not source.path:
        return Scanned(problems=[Problem(source.key, f"no images are given; set {source.key}=FOLDER")])
    skips = data.broken_images == Broken.skip
    limits = Limits(data.max_megapixels, decodes=skips if data.verify_images is None else data.verify_images)
    index = Index(Path(data.cache_dir).expanduser(), source.path, astuple(limits))
    if (is_url(source.path) or limits.decodes) and not index.path.exists():
        what = "decoding all images of" if limits.decodes else "looking through"
        log.info(f"{source.key}: {what} {public(source.path)}, once; what is found is kept in {index.path}")
    without = [] if inpaint is None or source.masks.folder is None else [source.masks.folder]
    wanted = Wanted(source.path, source.key, source.recursive, source.columns, without, bool(source.generate))
    try:
        found = find(wanted, index, limits)
    except SettingsError as error:
        return Scanned(problems=[Problem(source.key, str(error))])
    read = _in_threads(lambda item: _read(item, source, index, limits), found.items)
    whole = [each for each in read if not isinstance(each, Broke)]
    scanned = Scanned(whole, [each for each in read if isinstance(each, Broke)], found.problems)
    scanned.problems += findings.undrawn(source.key, source.generate - len(read))
    if inpaint is not None:
        scanned.problems += _attach_masks(scanned, source, inpaint, lambda file: _size(file, index, limits))
    else:
        scanned.problems += _drop_masks(scanned, source, found.masks)
    if read and not whole:
        scanned.problems.append(Problem(source.key, f"none of the {len(read)} images in {source.path} can be read"))
    index.flush()
    return _held_out(scanned, source)


def _in_threads(read: Callable[[Item], Read | Broke], items: Sequence[Item]) -> list[Read | Broke]:
    groups = [items[start : start + TOGETHER] for start in range(0, len(items), TOGETHER)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [each for group in pool.map(lambda group: list(map(read, group)), groups) for each in group]


def _read(item: Item, source: Source, index: Index, limits: Limits) -> Read | Broke:
    """One image's header and captions."""
    header = _header(item, index, limits)
    if header.flaw:
        return Broke(str(item.file), header.flaw)
    try:
        found = captions.found(item, source.captions, prompt=source.prompt, given=item.given)
    except captions.Unreadable as error:
        return Broke(str(item.file), str(error))
    sample = Sample(
        replace(item.file, bytes=header.bytes) if isinstance(item.file, Remote) else item.file,
        header.size,
        found or [""],
        concept=source.concept,
        weight=source.weight,
        validation=source.validation,
        prior=source.type == ConceptType.prior,
        caption_missing=not found,
        bytes=header.bytes,
        mask=item.mask,
    )
    return Read(sample, header)


def _header(item: Item, index: Index, limits: Limits) -> Header:
    """From the source where it has read it, else from the file."""
    if item.flaw:
        return Header(Size(0, 0), 0, "", 0, item.flaw)
    if item.header is not None:
        return item.header
    return _read_header(item.file, index, limits)


def _read_header(file: File, index: Index, limits: Limits) -> Header:
    """From what is known of a file, where that is quicker than to read it: elsewhere, or where it is decoded."""
    if isinstance(file, Path) and not limits.decodes:
        return headers.read(file, limits)
    try:
        name, before = (str(file.absolute()), stamp(file)) if isinstance(file, Path) else (str(file), file.identity())
    except OSError:  # it is not there, which its header says
        return headers.read(file, limits)
    known = index.get(name, before)
    if known is not None:
        return headers.from_json(known)
    header = headers.read(file, limits)
    if not header.flaw:  # what is mended there shows at once
        index.put(name, before, headers.as_json(header))
    return header


def _size(file: File, index: Index, limits: Limits) -> Size:
    """The size of a mask; raises ValueError where it has a flaw."""
    header = _read_header(file, index, limits)
    if header.flaw:
        raise ValueError(header.flaw)
    return header.size


def _attach_masks(scanned: Scanned, source: Source, inpaint: Inpaint, size_of: Callable[[File], Size]) -> list[Problem]:
    """Give the samples their masks; returns which of these cannot be used."""
    samples = [each.sample for each in scanned.whole]
    samples, unfit = mask_files.attached(samples, source.folder, source.masks, inpaint, size_of)
    scanned.whole = [Read(sample, each.header) for sample, each in zip(samples, scanned.whole)]
    return unfit


def _drop_masks(scanned: Scanned, source: Source, beside: int) -> list[Problem]:
    """Forget the masks of a run that looks at none, and say so.

    Args:
        beside: files that are masks by their name.
    """
    count = max(beside, sum(each.sample.mask is not None for each in scanned.whole))
    for each in scanned.whole:
        each.sample.mask = None
    return [mask_files.unseen(source.key, count)] if count else []


def _held_out(scanned: Scanned, source: Source) -> Scanned:
    """Mark a share for validation, chosen by content: more images do not move the earlier ones."""
    share = source.validation_share
    if share <= 0 or source.validation or not scanned.whole:
        return scanned
    with ThreadPoolExecutor() as pool:
        names = list(pool.map(lambda each: _content(each.sample), scanned.whole))
    for each, name in zip(scanned.whole, names):
        if rng.uniform("validation", name) < share:
            each.sample.validation = True
    if not any(each.sample.validation for each in scanned.whole):
        scanned.problems.append(findings.none_held_out(source.key, share, len(scanned.whole)))
    return scanned


def _content(sample: Sample) -> str:
    """What decides whether an image is held out, not its place: elsewhere than on a disk its length, and its name or,
    in a row of a table without one, its size."""
    path = sample.path
    if isinstance(path, Path):
        return content_hash(path)
    nameless = isinstance(path, Cell) and not path.called
    return f"{sample.size if nameless else path.name} {sample.bytes}"
