"""What a scan has to say of the files it went through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from otl.config import Broken, Data
from otl.datamodules.files import content_hash
from otl.datamodules.headers import Header
from otl.types import Problem, Sample
from otl.wording import counted

SAME = {"MPO": "JPEG"}  # a photograph with a preview beside it, in a .jpg


@dataclass(slots=True)
class Broke:
    """A file that is no image, or not all of one."""

    path: str
    reason: str


def broken(found: Sequence[Broke], policy: Broken) -> list[Problem]:
    """The files that cannot be trained on, each with the reason."""
    if not found:
        return []
    fatal = policy == Broken.error
    what = "mend or remove them, or leave them out with data.broken_images=skip" if fatal else "they are left out"
    rows = [(broke.path, broke.reason) for broke in found]
    message = f"{counted(len(found), 'file')} cannot be trained on; {what}"
    details = [f"{path}: {reason}" for path, reason in rows]
    return [Problem("data.broken_images", message, fatal, details, rows)]


def undecoded(data: Data) -> list[Problem]:
    """That damaged images are to be left out, and will not be found."""
    if data.broken_images != Broken.skip or data.verify_images is not False:
        return []
    message = "false, so that headers alone are looked at: an image that is damaged inside ends the run when it is "
    return [Problem("data.verify_images", f"{message}decoded, though data.broken_images=skip", fatal=False)]


def misnamed(samples: Sequence[Sample], headers: Sequence[Header]) -> list[Problem]:
    """Images of another format than their names say; they are read all the same."""
    details = []
    for sample, header in zip(samples, headers):
        said, is_ = _format(sample.path.suffix.lower()), SAME.get(header.format, header.format)
        if said != is_ and said:
            details.append(f"{sample.path}: it is {is_}")
    if not details:
        return []
    message = f"{counted(len(details), 'image')} with the extension of another format; read all the same"
    return [Problem("data.path", message, False, details)]


@cache
def _format(suffix: str) -> str | None:
    """What Pillow calls the format of an extension."""
    return Image.registered_extensions().get(suffix)


def duplicates(samples: Sequence[Sample], headers: Sequence[Header]) -> list[Problem]:
    """Images with the same bytes; only those whose length and last bytes agree are compared."""
    details = []
    alike = _groups(((header.bytes, header.mark, header.size), sample) for sample, header in zip(samples, headers))
    for group in alike:
        for same in _groups((content_hash(sample.path), sample) for sample in group):
            details.append(" = ".join(str(sample.path) for sample in same))
    if not details:
        return []
    message = f"{counted(len(details), 'image')} in the dataset more than once, and trained on as often"
    return [Problem("data.path", message, False, details)]


def _groups(pairs: Iterable[tuple[Hashable, Sample]]) -> Iterator[list[Sample]]:
    """The samples that share a label, where there are at least two."""
    by_label = defaultdict(list)
    for label, sample in pairs:
        by_label[label].append(sample)
    return (samples for samples in by_label.values() if len(samples) > 1)


def undrawn(setting: str, count: int) -> list[Problem]:
    """That the rest of a concept's images, so many, is drawn before the run."""
    if count <= 0:
        return []
    message = f"{counted(count, 'image')} will be drawn before the run, as many as are missing"
    return [Problem(setting, f"{message}; the plan counts them as if they were there", fatal=False)]


def none_held_out(setting: str, share: float, count: int) -> Problem:
    """That the share came out as no image at all."""
    message = f"{share} of {counted(count, 'image')} of {setting} came out as none held out"
    return Problem("data.validation_share", f"{message}; raise it, or give a validation concept", fatal=False)
