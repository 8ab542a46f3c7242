"""What an image is called this time: its caption, varied as the settings of its concept say. A function of a key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from otl import rng
from otl.config import CaptionOptions, Data, SettingsError
from otl.datamodules import captions, tags, wildcards
from otl.datamodules.tags import Listed
from otl.types import Problem, Sample

FILE = "file:"  # begins an entry that names a file of entries
PUNCTUATION = ",.;:!?"


def choose(captions: list[str], key: int) -> str:
    """One of the captions, each as likely."""
    return captions[int(rng.uniform(key, "caption") * len(captions))]


def dropped(key: int, share: float) -> bool:
    """Whether the caption is replaced by the empty one, in `share` (0..1) of all keys."""
    return rng.uniform(key, "caption dropout") < share


class Writer:
    """From the captions of one concept to the texts that it is trained with.

    Args:
        options: of the concept.
        varied: whether tags are dropped, shuffled and in other letters each time; those of held-out images are not.

    Raises:
        SettingsError: a file that they name is not there or cannot be read.
    """

    def __init__(self, options: CaptionOptions, *, varied: bool = True) -> None:
        self.options = options
        self.never = Listed.of(entries(options.tag_dropout_never), patterns=options.tag_dropout_patterns)
        self.only = Listed.of(entries(options.tag_dropout_only), patterns=options.tag_dropout_patterns)
        self.files = wildcard_files(options.wildcard_folder) if options.wildcards and options.wildcard_folder else {}
        self.check(options.prefix), self.check(options.postfix)
        self.moves = varied and (options.shuffle or options.tag_dropout > 0 or options.capitals > 0)

    def varies(self, caption: str) -> bool:
        """Whether keys may give different texts; a yes may be wrong, a no is not."""
        options = self.options
        chosen = options.wildcards and any(map(wildcards.has_choices, (caption, options.prefix, options.postfix)))
        return chosen or self.moves

    def check(self, text: str) -> None:
        """Raises Malformed: choices that cannot be read, or a file that is not there."""
        if self.options.wildcards:
            wildcards.check(text, self.files)

    def text(self, caption: str, key: int) -> str:
        """A caption as the model is given it."""
        options = self.options
        caption = self.expanded(caption, key, "wildcard")
        caption = tags.spaced(caption, options.separator) if options.spaces else caption
        caption = self.tagged(caption, key)
        prefix, postfix = self.expanded(options.prefix, key, "prefix"), self.expanded(options.postfix, key, "postfix")
        whole = beside(prefix, caption, postfix)
        if not options.trigger or has_words(whole, options.trigger):
            return whole
        called = tags.joiner(options.separator).join(part for part in (options.trigger, caption) if part)
        return beside(prefix, called, postfix)

    def expanded(self, text: str, key: int, stream: str) -> str:
        """With each choice made."""
        return wildcards.expand(text, key, self.files, stream) if self.options.wildcards else text

    def tagged(self, caption: str, key: int) -> str:
        """With what is done to its tags; a caption to which nothing is done stays as it is written."""
        options = self.options
        marked = options.keep_separator and options.keep_separator in caption
        if not (self.moves or options.lowercase or marked):
            return caption
        head, free, tail = tags.parted(
            caption, separator=options.separator, keep=options.keep, keep_separator=options.keep_separator
        )
        free = [tags.lowered(tag) for tag in free] if options.lowercase else free
        free = self.varied(free, key) if self.moves else free
        return tags.joiner(options.separator).join([*head, *free, *tail])

    def varied(self, free: list[str], key: int) -> list[str]:
        """Tags that are dropped, then in other letters, then in another order, as the settings say."""
        options = self.options
        if options.tag_dropout > 0:
            free = tags.thinned(
                free, share=options.tag_dropout, mode=options.tag_dropout_mode, droppable=self.droppable, key=key
            )
        if options.capitals > 0:
            free = tags.recased(free, share=options.capitals, kinds=options.capitals_kinds, key=key)
        return tags.shuffled(free, key) if options.shuffle else free

    def droppable(self, tag: str) -> bool:
        return tag not in self.never and (not self.only or tag in self.only)


def writers(data: Data, *, varied: bool = True) -> dict[str, Writer]:
    """Concept -> its writer; see there."""
    return {concept: writer_of(concept, each, varied) for concept, each in captions.options(data).items()}


def writer_of(concept: str, options: CaptionOptions, varied: bool) -> Writer:
    """Raises SettingsError: prefix or postfix cannot be read."""
    try:
        return Writer(options, varied=varied)
    except wildcards.Malformed as error:
        raise SettingsError(f"{captions.setting(concept)}.prefix, .postfix: {error}") from error


def malformed(samples: Iterable[Sample], of_concept: dict[str, Writer]) -> list[Problem]:
    """The images whose captions have choices that cannot be read."""
    details = [reason for sample in samples for reason in reasons(sample, of_concept[sample.concept])]
    if not details:
        return []
    message = (
        f"{len(details)} captions with choices that cannot be read; mend them, or set data.captions.wildcards=false"
    )
    return [Problem("data.captions.wildcards", message, True, details)]


def reasons(sample: Sample, writer: Writer) -> Iterator[str]:
    for caption in sample.captions:
        try:
            writer.check(caption)
        except wildcards.Malformed as error:
            yield f"{sample.path}: {error}"


def entries(listed: list[str]) -> list[str]:
    """Those of a setting, with the lines of each `file:PATH` in its place.

    Raises:
        SettingsError: such a file is not there or is not UTF-8.
    """
    found: list[str] = []
    for entry in listed:
        found += _lines(Path(entry.removeprefix(FILE)).expanduser()) if entry.startswith(FILE) else [entry]
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = captions.read(path)
    except captions.Unreadable as error:
        raise SettingsError(f"data.captions: {path}: {error}") from error
    if text is None:
        raise SettingsError(f"data.captions: {path} does not exist: give a file with a tag on each line")
    return captions.lines(text)


def wildcard_files(folder: str) -> wildcards.Files:
    """The files that `__name__` means.

    Raises:
        SettingsError: there is none, or one cannot be read.
    """
    try:
        files = wildcards.read(Path(folder).expanduser())
        wildcards.check_files(files)
    except wildcards.Malformed as error:
        raise SettingsError(f"data.captions.wildcard_folder={folder}: {error}") from error
    if not files:
        raise SettingsError(f"data.captions.wildcard_folder={folder}: no .txt file is there; give another folder")
    return files


def beside(prefix: str, caption: str, postfix: str) -> str:
    """The three in a row, with a space between two where there is none and no punctuation follows."""
    text = ""
    for part in (prefix, caption, postfix):
        apart = text and part and not text[-1].isspace() and not part[0].isspace() and part[0] not in PUNCTUATION
        text += f" {part}" if apart else part
    return text.strip()


def has_words(text: str, words: str) -> bool:
    """Whether they are in a text, as they are but for capitals, and not inside of longer ones."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Texts:
    """What the images of a dataset are called, draw by draw.

    Args:
        writers: concept -> how its captions become texts.
        seeds: concept -> of its own, or of the run.
        dropout: share of texts replaced by the empty one, 0..1.
        variants: texts of each caption, of which a draw takes one; None: each draw has its own.
    """

    writers: dict[str, Writer]
    seeds: dict[str, int]
    dropout: float = 0.0
    variants: int | None = None

    @classmethod
    def of_dataset(cls, data: Data, *, seed: int, training: bool, cached: bool) -> Texts:
        """Those of the images to train on, or of those held out; variants where conditioning is cached."""
        dropout, variants = data.caption_dropout if training else 0.0, data.caption_variants if cached else None
        own = {name: concept.seed for name, concept in data.concepts.items() if concept.seed is not None}
        of_concept = writers(data, varied=training)
        return cls(of_concept, dict.fromkeys(of_concept, seed) | own, dropout=dropout, variants=variants)

    def of(self, sample: Sample, key: int) -> str:
        """The text of a draw."""
        if dropped(key, self.dropout):
            return ""
        caption = choose(sample.captions, key)
        if self.variants is None:
            return self.writers[sample.concept].text(caption, key)
        return self.variant(sample.concept, caption, int(rng.uniform(key, "caption variant") * self.variants))

    def variant(self, concept: str, caption: str, number: int) -> str:
        """One of the texts of a caption; the same for every image that has it, so that the cache holds it once."""
        return self.writers[concept].text(caption, rng.key(self.seeds[concept], "caption variant", caption, number))

    def all_of(self, sample: Sample) -> list[str]:
        """Every text of the image's draws where they are variants, each once; not the empty one of the dropout."""
        assert self.variants is not None
        writer, variants = self.writers[sample.concept], self.variants
        numbers = ((each, n) for each in sample.captions for n in range(variants if writer.varies(each) else 1))
        return list(dict.fromkeys(self.variant(sample.concept, caption, number) for caption, number in numbers))

    def distinct(self, samples: Iterable[Sample]) -> set[str]:
        """Every text that can come up, the empty one too where texts are dropped."""
        found = {text for sample in samples for text in self.all_of(sample)}
        return found | {""} if self.dropout > 0 else found
