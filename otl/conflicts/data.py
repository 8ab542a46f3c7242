"""Settings of the dataset that make no sense together, as far as it can be told before the images are looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from otl.config import CaptionOptions, Concept, ConceptType, Data, Problem, shared_captions
from otl.signatures import Unknown
from otl.urls import is_url
from otl.wording import show

SMALLEST_SIDE = 64  # pixels, of a bucket
OF_TRAINING = (
    "repeats",
    "samples",
    "loss_weight",
    "validation_share",
)  # fields of a concept that its validation images have no use for


def of_data(data: dict[str, Any]) -> Iterator[Problem]:
    """What would have no effect, or contradicts something else."""
    concepts: dict[str, dict[str, Any]] = data.get("concepts") or {}
    if data.get("path") and "data" in concepts:
        yield Problem("data.concepts.data", "the images of data.path go by this name: give the concept another one")
    for name, concept in concepts.items():
        yield from _of_concept(f"data.concepts.{name}", concept)
    yield from of_captions(data)
    resolutions = {"data.resolution": data.get("resolution")}
    resolutions |= {f"data.concepts.{name}.resolution": concept.get("resolution") for name, concept in concepts.items()}
    yield from _of_resolutions(data, {key: value for key, value in resolutions.items() if value is not None})
    yield from _of_buckets(data)
    if data.get("cache") is False and data.get("encode_batch_size") not in (None, Unknown, Data.encode_batch_size):
        message = f"{show(data['encode_batch_size'])} would have no effect: data.cache=false"
        yield Problem("data.encode_batch_size", message)


def _of_resolutions(data: dict[str, Any], asked: dict[str, Any]) -> Iterator[Problem]:
    """One resolution or several, of the dataset and of concepts."""
    lists = {key: value for key, value in asked.items() if isinstance(value, list)}
    for key, value in asked.items():
        if data.get("bucket_sizes"):
            yield Problem(key, f"{show(value)} would have no effect: data.bucket_sizes says what the buckets are")
        elif value == []:
            yield Problem(key, "the list is empty: give a number of pixels, several, or null")
    for key, value in lists.items():
        if twice := [each for each, count in Counter(map(str, value)).items() if count > 1]:
            yield Problem(key, f"{twice[0]} is there more than once: leave one out")
    if data.get("each_resolution") is False and all(len(value) < 2 for value in lists.values()):
        message = "false would have no effect: there is one resolution; give several, data.resolution=[512,768]"
        yield Problem("data.each_resolution", message)


def _of_buckets(data: dict[str, Any]) -> Iterator[Problem]:
    """What buckets there are."""
    for index, text in enumerate(data.get("bucket_sizes") or []):
        sides = re.fullmatch(r"(\d+)x(\d+)", text) if isinstance(text, str) else None
        if sides is None or min(int(sides[1]), int(sides[2])) < SMALLEST_SIDE:
            message = f"{show(text)} is not accepted: give height x width in pixels, at least {SMALLEST_SIDE}: 768x1344"
            yield Problem(f"data.bucket_sizes[{index}]", message)
    for name in ("min_bucket_side", "max_bucket_side"):
        if data.get(name) is not None and (data.get("bucket_sizes") or data.get("buckets") is False):
            other = "data.bucket_sizes says what the buckets are" if data.get("bucket_sizes") else "data.buckets=false"
            yield Problem(f"data.{name}", f"{show(data[name])} would have no effect: {other}")
    if data.get("bucket_sizes") and data.get("buckets") is False:
        yield Problem("data.buckets", "false and data.bucket_sizes: leave one of them out; one size is a list of one")
    if data.get("no_upscale") and data.get("warn_upscale") not in (None, Data.warn_upscale):
        message = f"{show(data['warn_upscale'])} would have no effect: data.no_upscale=true, so that none is enlarged"
        yield Problem("data.warn_upscale", message)
    low, high = data.get("min_bucket_side"), data.get("max_bucket_side")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        yield Problem("data.min_bucket_side", f"{low} is above data.max_bucket_side={high}")


def _of_concept(key: str, concept: dict[str, Any]) -> Iterator[Problem]:
    yield from _of_class_images(key, concept)
    if concept.get("type") == ConceptType.validation:
        for name in filter(lambda name: _changed(concept, name), OF_TRAINING):
            message = f"{show(concept[name])} would have no effect: {key}.type=validation, whose images are seen once"
            yield Problem(f"{key}.{name}", message)
    elif concept.get("samples") is not None and _changed(concept, "repeats"):
        message = f"{show(concept['samples'])} and {key}.repeats={show(concept['repeats'])}: leave one of them out"
        yield Problem(f"{key}.samples", message)
    if concept.get("generate") and isinstance(concept.get("path"), str) and is_url(concept["path"]):
        message = f"{concept['generate']} images cannot be drawn into {concept['path']}: give a folder on a disk"
        yield Problem(f"{key}.generate", message)


def _of_class_images(key: str, concept: dict[str, Any]) -> Iterator[Problem]:
    """Those of `type=regularisation`, and those that the model draws."""
    kind = concept.get("type")
    if kind == ConceptType.validation and concept.get("generate"):
        message = f"{concept['generate']} images of the model's own say nothing about validation: give photographs"
        yield Problem(f"{key}.generate", message)
    if kind != ConceptType.regularisation:
        return
    prompt = concept.get("prompt")
    if concept.get("enabled", True) and (prompt is None or (isinstance(prompt, str) and not prompt.strip())):
        message = f"must be given: the class prompt of {key}.type=regularisation, such as 'a photo of a dog'"
        yield Problem(f"{key}.prompt", message)
    if concept.get("validation_share"):
        message = "would have no effect: class images are never held out; leave it out"
        yield Problem(f"{key}.validation_share", f"{show(concept['validation_share'])} {message}")
    if trigger := (concept.get("captions") or {}).get("trigger"):
        message = f"{show(trigger)} would be taught with class images, which it is to be told from: leave it out"
        yield Problem(f"{key}.captions.trigger", message)


def _changed(concept: dict[str, Any], name: str) -> bool:
    """Whether a field is another than where it is not given."""
    return name in concept and concept[name] != getattr(Concept, name)


# Captions

Options = dict[str, Any]
Rule = tuple[str, Callable[[Options], bool]]
"""What a setting is of no use without, and whether that is given."""


def _plain(value: Any) -> Any:
    """A choice by its name, a list by its entries, anything else as it is."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.name if isinstance(value, Enum) else value


def _source(name: str) -> Rule:
    return f"{name} among data.captions.sources", lambda options: name in options["sources"]


def _moves(options: Options) -> bool:
    return bool(options["shuffle"] or options["tag_dropout"] or options["capitals"])


def varies(options: Options) -> bool:
    """Whether the texts of a caption may differ from draw to draw."""
    return _moves(options) or bool(options["wildcards"])


DROPOUT: Rule = ("tag_dropout above 0", lambda options: bool(options["tag_dropout"]))
LISTS: Rule = (
    "tag_dropout_never or tag_dropout_only",
    lambda options: bool(options["tag_dropout_never"] or options["tag_dropout_only"]),
)
TAGS: Rule = (
    "shuffle, tag_dropout, capitals, lowercase, spaces, keep_separator, trigger or json among the sources",
    lambda options: (
        any(options[name] for name in ("lowercase", "spaces", "keep_separator", "trigger"))
        or _moves(options)
        or "json" in options["sources"]
    ),
)
RULES: dict[str, Rule] = {
    "suffix": _source("file"),
    "json_suffix": _source("json"),
    "json_keys": _source("json"),
    "json_separator": _source("json"),
    "name_spaces": _source("name"),
    "name_cut_numbers": _source("name"),
    "separator": TAGS,
    "keep": ("shuffle, tag_dropout, capitals or lowercase", lambda options: _moves(options) or options["lowercase"]),
    "tag_dropout_mode": DROPOUT,
    "tag_dropout_never": DROPOUT,
    "tag_dropout_only": DROPOUT,
    "tag_dropout_patterns": LISTS,
    "capitals_kinds": ("capitals above 0", lambda options: bool(options["capitals"])),
    "wildcard_folder": ("wildcards=true", lambda options: bool(options["wildcards"])),
}


def _filled(options: CaptionOptions) -> Options:
    return {each.name: _plain(getattr(options, each.name)) for each in fields(CaptionOptions)}


DEFAULTS = _filled(CaptionOptions())
OF_CLASS_IMAGES = _filled(shared_captions(ConceptType.regularisation, CaptionOptions()))


def of_captions(data: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with `data.captions`, those of the concepts, and what belongs to them."""
    common, concepts = _common(data), _concepts(data)
    own = {name: _own(concept) for name, concept in concepts.items()}
    if Unknown in common.values() or any(Unknown in each.values() for each in own.values()):
        return
    apart = {name for name, each in concepts.items() if each.get("type") == ConceptType.regularisation}
    merged = merged_captions(data)
    sharing = [options for name, options in merged.items() if name not in apart]
    sharing += [DEFAULTS | common] if data.get("path") or not concepts else []
    yield from _check("data.captions", common, sharing)
    for name, each in own.items():
        yield from _check(f"data.concepts.{name}.captions", each, [merged[name]])
    yield from _check_prompts(data, DEFAULTS | common, concepts, merged)
    variants = data.get("caption_variants")
    if variants not in (None, Unknown, Data.caption_variants) and not (
        data.get("cache") and any(map(varies, [*sharing, *merged.values()]))
    ):
        needed = "data.cache=true, and shuffle, tag_dropout, capitals or wildcards of data.captions"
        yield Problem("data.caption_variants", f"{variants} would have no effect: it needs {needed}")


def merged_captions(data: dict[str, Any]) -> dict[str, Options]:
    """Concept -> the options of its captions, complete."""
    common = DEFAULTS | _common(data)
    return {
        name: (OF_CLASS_IMAGES if each.get("type") == ConceptType.regularisation else common) | _own(each)
        for name, each in _concepts(data).items()
    }


def _common(data: dict[str, Any]) -> Options:
    return {name: _plain(value) for name, value in (data.get("captions") or {}).items()}


def _concepts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: each for name, each in (data.get("concepts") or {}).items() if isinstance(each, dict)}


def all_captions(data: dict[str, Any]) -> dict[str, Options]:
    """Name of a group of options -> them, complete: of `data.path` and of the concepts."""
    found = {"data.captions": DEFAULTS | _common(data)} if data.get("path") else {}
    return found | {f"data.concepts.{name}.captions": each for name, each in merged_captions(data).items()}


def prompts_read(data: dict[str, Any]) -> dict[str, bool]:
    """Options of captions by their name -> whether prompts are among the sources."""
    return {key: "prompt" in options["sources"] for key, options in all_captions(data).items()}


def _own(concept: dict[str, Any]) -> Options:
    return {name: _plain(value) for name, value in (concept.get("captions") or {}).items() if value is not None}


def _check(key: str, given: Options, used_in: list[Options]) -> Iterator[Problem]:
    """One group of options.

    Args:
        key: its name.
        given: what it says.
        used_in: the options, complete, of all images that it is for.
    """
    for name, (needed, used) in RULES.items():
        if name in given and given[name] != DEFAULTS[name] and not any(map(used, used_in)):
            yield Problem(f"{key}.{name}", f"{show(given[name])} would have no effect: it needs {needed}")
    for name in ("sources", "suffix", "json_suffix", "json_keys", "separator", "capitals_kinds"):
        if name in given and not given[name]:
            yield Problem(f"{key}.{name}", "nothing is given: give at least one, or leave the setting out")
    folder = given.get("wildcard_folder")
    if folder and not Path(folder).expanduser().is_dir():
        yield Problem(f"{key}.wildcard_folder", f"{folder} is no folder; give that of the .txt files")
    if given.get("tag_dropout_patterns"):
        yield from _check_patterns(key, given)


def _check_patterns(key: str, given: Options) -> Iterator[Problem]:
    for name in ("tag_dropout_never", "tag_dropout_only"):
        for entry in given.get(name) or []:
            try:
                re.compile(entry)
            except re.error as error:
                yield Problem(f"{key}.{name}", f"{entry} is no regular expression: {error}")


def _check_prompts(
    data: dict[str, Any], common: Options, concepts: dict[str, dict[str, Any]], merged: dict[str, Options]
) -> Iterator[Problem]:
    """Prompts that are no source of captions."""
    if data.get("prompt") and "prompt" not in common["sources"]:
        yield _unused("data.prompt", data["prompt"])
    for name, concept in concepts.items():
        if concept.get("prompt") and not concept.get("generate") and "prompt" not in merged[name]["sources"]:
            yield _unused(f"data.concepts.{name}.prompt", concept["prompt"])


def _unused(key: str, prompt: str) -> Problem:
    return Problem(key, f"{show(prompt)} would have no effect: it needs prompt among data.captions.sources")
