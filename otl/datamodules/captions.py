"""The captions that an image has: beside it, in a manifest, in its name, or its concept's prompt."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from otl.config import CaptionOptions, CaptionSource, Data, Missing, overridden, shared_captions
from otl.datamodules.tags import joiner
from otl.types import Problem, Sample

LINE_END = re.compile(r"\r\n|\r|\n")
NUMBERS = re.compile(r"(?:[\s_.-]*(?:\(\d+\)|\d+))+$")  # cat_2_001, cat (3)
SOUGHT = {  # in messages
    CaptionSource.manifest: "the caption of a manifest",
    CaptionSource.file: "a {suffix} of the same name beside each",
    CaptionSource.json: "{json_keys} in a {json_suffix} of the same name beside each",
    CaptionSource.name: "words in its own name",
    CaptionSource.prompt: "{prompt}",
}
WHAT_BECOMES = {
    Missing.error: "give them one, or set data.missing_captions=allow (or warn) to train them with the empty caption, "
    "skip to leave them out",
    Missing.warn: "trained with the empty caption",
    Missing.skip: "left out",
    Missing.allow: "trained with the empty caption; plan.json says which",
}


class Unreadable(ValueError):
    """A file of captions that is there and cannot be used; says why."""


def options(data: Data) -> dict[str, CaptionOptions]:
    """Concept -> its options; that of `data.path` is called "data"."""
    found = {"data": data.captions}
    for name, concept in data.concepts.items():
        found[name] = overridden(shared_captions(concept.type, data.captions), concept.captions)
    return found


def setting(concept: str) -> str:
    """The name of a concept's options."""
    return "data.captions" if concept == "data" else f"data.concepts.{concept}.captions"


def found(image: Path, options: CaptionOptions, *, prompt: str | None, given: Sequence[str] = ()) -> list[str]:
    """What the first of the sources says that says anything; one of them is chosen each time.

    Args:
        image: its path; nothing is asked of it but its name and its neighbours.
        options: which sources there are, in which order.
        prompt: of the concept, one caption a line; None: it has none; "": the empty caption is meant.
        given: what a manifest says of the image.

    Raises:
        Unreadable: a file beside the image is no text, or not what it should be.
    """
    readers: dict[CaptionSource, Callable[[], list[str]]] = {
        CaptionSource.manifest: lambda: [line for text in given for line in lines(text)],
        CaptionSource.file: lambda: lines(beside(image, options.suffix) or ""),
        CaptionSource.json: lambda: from_json(image, options),
        CaptionSource.name: lambda: from_name(image.stem, options),
        CaptionSource.prompt: lambda: [] if prompt is None else lines(prompt) or [""],
    }
    return next((captions for source in options.sources if (captions := readers[source]())), [])


def lines(text: str) -> list[str]:
    """One caption a line; empty lines are none."""
    return [line.strip() for line in LINE_END.split(text) if line.strip()]


def beside(image: Path, suffix: str) -> str | None:
    """The text of photo.txt, or else of photo.jpg.txt, beside photo.jpg; None where neither is there."""
    for name in (image.stem, image.name):
        text = read(image.with_name(name + suffix))
        if text is not None:
            return text
    return None


def read(path: Path) -> str | None:
    """A file's text; None where there is no such file.

    Raises:
        Unreadable: it is not UTF-8, or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            content = file.read()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # then there cannot be such a file
            return None
        raise Unreadable(f"its caption {path.name} cannot be read ({error.strerror or error})") from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content:
        raise Unreadable(f"its caption {path.name} is not UTF-8 text (it looks like UTF-16); save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason}: byte 0x{content[error.start]:02x} at {error.start}"
        raise Unreadable(f"its caption {path.name} is not UTF-8 text ({where}); save it as UTF-8") from error


def from_json(image: Path, options: CaptionOptions) -> list[str]:
    """The caption of the chosen keys, joined in their order; none where none of them is there."""
    text, name = beside(image, options.json_suffix), image.stem + options.json_suffix
    if text is None:
        return []
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Unreadable(f"its caption {name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise Unreadable(f"its caption {name} is no JSON object; give one with the keys of data.captions.json_keys")
    parts = [part for key in options.json_keys for part in tags_of(inside(content, key), options, f"{name}, {key}")]
    caption = joiner(options.separator).join(parts)
    return [caption] if caption else []


def inside(content: dict[str, Any], key: str) -> Any:
    """The value of `a.b`: of a key of that name, or of b inside of a; None where there is neither."""
    if key in content:
        return content[key]
    outer, _, inner = key.partition(".")
    return inside(content[outer], inner) if inner and isinstance(content.get(outer), dict) else None


def tags_of(value: Any, options: CaptionOptions, where: str) -> list[str]:
    """The texts in a string, a list of strings, or lists by kind."""
    if value is None:
        return []
    if isinstance(value, str):
        parts = value.split(options.json_separator) if options.json_separator else [value]
        return [" ".join(part.split()) for part in parts if part.strip()]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        raise Unreadable(f"its caption {where} is {json.dumps(value)}: a string or a list of strings is expected")
    return [tag for each in value for tag in tags_of(each, options, where)]


def from_name(stem: str, options: CaptionOptions) -> list[str]:
    """A file's name without its suffix as a caption."""
    stem = NUMBERS.sub("", stem) if options.name_cut_numbers else stem
    return lines(" ".join(stem.replace("_", " ").split()) if options.name_spaces else stem)


def uncaptioned(
    samples: list[Sample], policy: Missing, of_concept: dict[str, CaptionOptions]
) -> tuple[list[Sample], list[Problem]]:
    """The samples to go on with, and those that have no caption."""
    missing = [sample for sample in samples if sample.caption_missing]
    if not missing:
        return samples, []
    message = f"{len(missing)} of {len(samples)} image{'s' if len(samples) != 1 else ''} without a caption "
    message += f"(sought: {sought(missing[0].concept, of_concept)}); {WHAT_BECOMES[policy]}"
    files = [str(sample.path) for sample in missing]
    problem = Problem(
        "data.missing_captions", message, policy == Missing.error, [] if policy == Missing.allow else files
    )
    if policy != Missing.skip:
        return samples, [problem]
    problem.left_out = [(file, "it has no caption, and data.missing_captions=skip") for file in files]
    problem.fatal = len(missing) == len(samples)
    return [sample for sample in samples if not sample.caption_missing], [problem]


def sought(concept: str, of_concept: dict[str, CaptionOptions]) -> str:
    """Where a concept's captions are looked for."""
    options = of_concept[concept]
    words = {
        "suffix": options.suffix,
        "json_suffix": options.json_suffix,
        "json_keys": " or ".join(options.json_keys),
        "prompt": "data.prompt" if concept == "data" else f"data.concepts.{concept}.prompt",
    }
    return ", ".join(SOUGHT[source].format(**words) for source in options.sources)
