"""The tags of a caption: which stay, which are dropped, in which order and in which letters. Functions of a key."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from otl import rng
from otl.config import Capitals, TagDropout

PLACEHOLDER = re.compile(r"(<[^<>]*>)")  # an embedding's word, which is known by its letters
SHORT = 3  # letters: ^_^ and o_o are faces, not words


def split(caption: str, separator: str) -> list[str]:
    """The tags, without those that are empty."""
    return [tag.strip() for tag in caption.split(separator) if tag.strip()]


def joiner(separator: str) -> str:
    """What is put between tags: the separator, and a space where it does not end with one."""
    return separator if separator[-1:].isspace() else f"{separator} "


def parted(caption: str, *, separator: str, keep: int, keep_separator: str) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay at the beginning, those between, and those that stay at the end.

    Args:
        caption: its tags.
        separator: between two of them.
        keep: how many stay at the beginning, where there is no `keep_separator` in the caption.
        keep_separator: what stands before it stays, and what follows a second one; empty: there is none.
    """
    if not keep_separator or keep_separator not in caption:
        tags = split(caption, separator)
        return tags[:keep], tags[keep:], []
    head, middle, *tail = caption.split(keep_separator)
    return split(head, separator), split(middle, separator), [tag for part in tail for tag in split(part, separator)]


def thinned(
    tags: Sequence[str], *, share: float, mode: TagDropout, droppable: Callable[[str], bool], key: int
) -> list[str]:
    """Without those that are dropped this time.

    Args:
        tags: in their order.
        share: probability, 0..1.
        mode: whether it is that of all together (whole), of each (each), or of the last (weighted): there the i-th of
            n that may be dropped has i / n of it, i from 1.
        droppable: whether a tag may be dropped.
        key: of the draw.
    """
    may = [index for index, tag in enumerate(tags) if droppable(tag)]
    if mode == TagDropout.whole:
        gone = set(may) if rng.uniform(key, "tag dropout") < share else set()
    else:
        chances = [share * (n / len(may) if mode == TagDropout.weighted else 1.0) for n in range(1, len(may) + 1)]
        gone = {index for index, chance in zip(may, chances) if rng.uniform(key, "tag dropout", index) < chance}
    return [tag for index, tag in enumerate(tags) if index not in gone]


def shuffled(tags: Sequence[str], key: int) -> list[str]:
    """Each order as likely."""
    return [tags[index] for index in rng.permutation(len(tags), key, "tag shuffle")]


def recased(tags: Sequence[str], *, share: float, kinds: Sequence[Capitals], key: int) -> list[str]:
    """A share of them with capitals of a kind, each kind as likely."""
    return [
        capitalized(tag, kinds[int(rng.uniform(key, "kind of capitals", index) * len(kinds))], key=key, index=index)
        if rng.uniform(key, "capitals", index) < share
        else tag
        for index, tag in enumerate(tags)
    ]


def capitalized(tag: str, kind: Capitals, *, key: int, index: int) -> str:
    """A tag with capitals: of all letters, of the first of each word, of the first, or of half of them by chance."""
    if kind == Capitals.upper:
        return outside_placeholders(tag, lambda text: "".join(map(upper, text)))
    if kind == Capitals.title:
        return outside_placeholders(tag, lambda text: re.sub(r"(?<!\S)\w", lambda found: upper(found[0]), text))
    if kind == Capitals.first:
        return upper(tag[:1]) + tag[1:]
    coins = (rng.uniform(key, "capital letter", index, place) < 0.5 for place in range(len(tag)))
    return outside_placeholders(tag, lambda text: "".join(map(flipped, text, coins)))


def flipped(letter: str, capital: bool) -> str:
    return upper(letter) if capital else lower(letter)


def upper(letter: str) -> str:
    """Its capital; a letter that has none, or another letter's, stays."""
    capital = letter.upper()
    return capital if capital.casefold() == letter.casefold() else letter


def lower(letter: str) -> str:
    """The same the other way round."""
    small = letter.lower()
    return small if small.casefold() == letter.casefold() else letter


def lowered(caption: str) -> str:
    """In small letters."""
    return outside_placeholders(caption, lambda text: "".join(map(lower, text)))


def spaced(caption: str, separator: str) -> str:
    """Underscores as spaces, in all tags but the shortest: ^_^ is a face."""
    pieces = caption.split(separator)
    return separator.join(
        outside_placeholders(piece, lambda text: text.replace("_", " ")) if len(piece.strip()) > SHORT else piece
        for piece in pieces
    )


def outside_placeholders(text: str, change: Callable[[str], str]) -> str:
    """Change what is not in <angle brackets>."""
    pieces = PLACEHOLDER.split(text)
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(pieces))


@dataclass(frozen=True)
class Listed:
    """A list of tags; `tag in listed` asks whether it has one, capitals aside.

    Args:
        words: the tags, in small letters.
        patterns: regular expressions for whole tags.
    """

    words: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def of(cls, entries: Sequence[str], *, patterns: bool) -> Listed:
        """
        Args:
            entries: tags; or regular expressions, where they are `patterns`.
        """
        entries = [entry.strip() for entry in entries if entry.strip()]
        if patterns:
            return cls(patterns=tuple(re.compile(entry, re.IGNORECASE) for entry in entries))
        return cls(words=frozenset(entry.casefold() for entry in entries))

    def __bool__(self) -> bool:
        return bool(self.words or self.patterns)

    def __contains__(self, tag: str) -> bool:
        return tag.casefold() in self.words or any(pattern.fullmatch(tag) for pattern in self.patterns)
