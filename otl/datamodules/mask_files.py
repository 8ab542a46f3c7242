"""Which images have a mask: a file beside them, one in a folder of masks, or their alpha channel. Reads headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from otl.config import Data, Inpaint, MaskSource
from otl.datamodules import images
from otl.types import File, Problem, Sample, Size
from otl.wording import counted

LABEL = "-masklabel"
EXTENSIONS = (".png", ".webp", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")


@dataclass(frozen=True)
class MaskFiles:
    """Where the masks of a concept's images are."""

    folder: Path | None = None  # of files named as the images; None: beside them
    setting: str = "data.mask_folder"  # that gave the folder
    alpha: bool = False  # whether the alpha channel of an image without a file is its mask


def options(data: Data) -> dict[str, MaskFiles]:
    """Concept -> where its masks are; that of `data.path` is called "data"."""
    common = MaskFiles(_folder(data.mask_folder), alpha=data.mask_alpha)
    found = {"data": common}
    for name, concept in data.concepts.items():
        own = common if concept.mask_alpha is None else replace(common, alpha=concept.mask_alpha)
        if concept.mask_folder is not None:
            own = replace(own, folder=_folder(concept.mask_folder), setting=f"data.concepts.{name}.mask_folder")
        found[name] = own
    return found


def _folder(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def find(image: File, root: Path | None, folder: Path | None) -> Path | None:
    """The mask file of an image, if there is one.

    Args:
        image: its file; only one on a disk has others beside it.
        root: the folder that was searched for images; None: there is none.
        folder: of masks, with the names and subfolders of `root`; None: beside the image.
    """
    if not isinstance(image, Path):
        return None
    if folder is None:
        stem = image.with_name(image.stem + LABEL)
    elif root is not None and image.is_relative_to(root):
        stem = folder / image.relative_to(root).with_suffix("")
    else:
        stem = folder / image.stem
    names = [stem.with_name(stem.name + extension) for extension in EXTENSIONS]
    return next((name for name in names if name.is_file()), None)


def attached(
    samples: Sequence[Sample],
    root: Path | None,
    files: MaskFiles,
    inpaint: Inpaint,
    size_of: Callable[[File], Size] = images.header_size,
) -> tuple[list[Sample], list[Problem]]:
    """The samples with their masks, and which of these cannot be used.

    Args:
        samples: of one concept; some may have a mask already, which a manifest gave.
        root: the folder that was searched for them; None: there is none.
        files: where masks are.
        inpaint: whether they are looked at.
        size_of: the size of a mask; raises one of `images.UNREADABLE`.
    """
    if inpaint.masks == MaskSource.generated:
        return [replace(sample, mask=None) for sample in samples], []
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda sample: replace(sample, mask=_mask(sample, root, files)), samples))
        unfit = [reason for reason in pool.map(lambda sample: _unfit(sample, size_of), found) if reason]
    if not unfit:
        return found, []
    message = f"{counted(len(unfit), 'mask')} cannot be laid over their images; mend them, or move them away"
    return found, [Problem(files.setting, message, details=unfit)]


def _mask(sample: Sample, root: Path | None, files: MaskFiles) -> File | None:
    mask = sample.mask or find(sample.path, root, files.folder)
    return sample.path if mask is None and files.alpha and images.has_alpha(sample.path) else mask


def _unfit(sample: Sample, size_of: Callable[[File], Size]) -> str | None:
    """Why the mask of a sample cannot be used, if it has one."""
    if sample.mask is None or sample.mask == sample.path:
        return None
    try:
        size = size_of(sample.mask)
    except images.UNREADABLE as error:
        return f"{sample.mask}: {images.reason(error)}"
    if fits(size, sample.size):
        return None
    return f"{sample.mask}: {size} (height x width) does not have the shape of {sample.name}, {sample.size}"


def fits(mask: Size, image: Size) -> bool:
    """Whether a mask of that size can lie over the image: the same aspect ratio, up to a pixel of the smaller one."""
    scale = min(mask.h / image.h, mask.w / image.w)
    return abs(mask.h - image.h * scale) <= 1 and abs(mask.w - image.w * scale) <= 1


def lacking(samples: Sequence[Sample], files: Mapping[str, MaskFiles], inpaint: Inpaint) -> Iterator[Problem]:
    """What there is to say of images without a mask.

    Args:
        files: by concept, where masks are.
    """
    bare = [sample for sample in samples if sample.mask is None]
    if inpaint.masks == MaskSource.files and bare:
        message = (
            f"{len(bare)} of {len(samples)} images have no mask: put NAME{LABEL}.png beside each, or name a folder of "
            "them by data.mask_folder, or have masks generated for these images with inpaint.masks=both"
        )
        yield Problem("inpaint.masks", message, details=[str(sample.path) for sample in bare])
    if inpaint.masks != MaskSource.both:
        return
    for concept, where in files.items():
        own = [sample for sample in samples if sample.concept == concept]
        if where.folder is not None and own and all(sample.mask in (None, sample.path) for sample in own):
            message = "there is no mask for any image: masks are named as the images, in the same subfolders"
            yield Problem(where.setting, f"{where.folder}: {message}")
        elif where.alpha and own and all(sample.mask != sample.path for sample in own):
            message = "no image without a mask file has an alpha channel, so that it would have no effect"
            yield Problem(where.setting.replace("mask_folder", "mask_alpha"), message, fatal=False)


def unseen(key: str, count: int) -> Problem:
    """Masks of the images of a source, in a run that looks at none."""
    message = f"{counted(count, 'mask')} (NAME{LABEL}, or of a table) would count with loss.masked=true, and do not now"
    return Problem(key, message, fatal=False)


def unused(data: Data, inpaint: Inpaint | None) -> Iterator[Problem]:
    """Settings of masks in a run that looks at none."""
    if inpaint is None:
        why = "nothing looks at masks: set loss.masked=true, or train an inpainting model"
    elif inpaint.masks == MaskSource.generated:
        why = "it needs inpaint.masks=files or both"
    else:
        return
    groups = {"data": data} | {f"data.concepts.{name}": each for name, each in data.concepts.items()}
    for group, each in groups.items():
        for name in ("mask_folder", "mask_alpha"):
            if given := getattr(each, name):
                yield Problem(f"{group}.{name}", f"{given} would have no effect: {why}")
