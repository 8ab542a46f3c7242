"""Captions that say one thing or another: `{a|b}`, `{2::a|b}`, `{2$$a|b|c}`, and `__name__` for a line of a file.

The syntax is that of dynamic prompts without its variables
(https://github.com/adieyal/sd-dynamic-prompts/blob/main/docs/SYNTAX.md).
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from otl import rng

DEEPEST = 50  # choices inside of each other
LISTED = 10  # files named in an error
TOKEN = re.compile(r"\\[{}|\\_]|[{}|]|__[\w./* -]+?__|[^\\{}|_]+|.", re.DOTALL)
WEIGHT = re.compile(r"\s*(\d+\.?\d*|\.\d+)::")
COUNT = re.compile(r"(\d*)(-?)(\d*)\$\$(?:([^$]*)\$\$)?")  # low, -, high, and what is put between the chosen


class Malformed(ValueError):
    """What is written cannot be read as choices; says why."""


@dataclass(frozen=True)
class Name:
    """A line of the files of a name, which may hold `*`."""

    name: str


@dataclass(frozen=True)
class Choice:
    """Some of several texts, each at most once."""

    options: tuple[Option, ...]
    low: int = 1  # at least so many
    high: int = 1  # at most so many
    joiner: str = ", "


Text = tuple["str | Name | Choice", ...]
Option = tuple[float, Text]
"""Weight and text."""
Files = Mapping[str, tuple[Option, ...]]
"""Name, as in `__name__`, -> the lines of its file."""


def has_choices(text: str) -> bool:
    """Whether there may be anything to choose."""
    return "{" in text or "}" in text or "__" in text or "\\" in text


def expand(text: str, key: int, files: Files, stream: str = "wildcard") -> str:
    """One of the texts that are meant.

    Args:
        text: with choices.
        key: of the draw.
        files: of the names.
        stream: names what the choices are for.

    Raises:
        Malformed: it cannot be read, or names a file that is not there.
    """
    if not has_choices(text):
        return text
    numbers = (rng.uniform(key, stream, number) for number in itertools.count())
    return _written(parse(text), numbers, files, DEEPEST)


def check(text: str, files: Files) -> None:
    """Raises Malformed: a text cannot be read, or names a file that is not there."""
    if has_choices(text):
        for name in _names(parse(text)):
            _lines(name, files)


def check_files(files: Files) -> None:
    """Raises Malformed: the same of a line of a file, or a file that leads back to itself."""
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise Malformed(f"{' -> '.join((*path, name))} leads back to itself")
        if name in done:
            return
        for other in _files_of(name, files):
            for inner in (inner for _, line in files[other] for inner in _names(line)):
                _lines(inner, files)
                follow(inner, (*path, name))
        done.add(name)

    for name in files:
        follow(name, ())


def read(folder: Path) -> dict[str, tuple[Option, ...]]:
    """The .txt files of a folder and below: a.txt in colours is `__colours/a__`.

    Raises:
        Malformed: a file is not UTF-8, or a line cannot be read.
    """
    return {path.relative_to(folder).with_suffix("").as_posix(): _read(path) for path in sorted(folder.rglob("*.txt"))}


def _read(path: Path) -> tuple[Option, ...]:
    try:
        return options(path.read_text(encoding="utf-8-sig").split("\n"))
    except UnicodeDecodeError as error:
        raise Malformed(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except Malformed as error:
        raise Malformed(f"{path}: {error}") from error


def options(lines: Iterable[str]) -> tuple[Option, ...]:
    """The texts of a file, one a line, each with or without a weight; # begins a comment."""
    texts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    weights = [WEIGHT.match(text) for text in texts]
    return tuple(
        (float(weight[1]) if weight else 1.0, parse(text[weight.end() :] if weight else text))
        for text, weight in zip(texts, weights)
    )


@functools.lru_cache(maxsize=1 << 16)
def parse(text: str) -> Text:
    """The parts of a text.

    Raises:
        Malformed: a brace without its other one.
    """
    tokens = TOKEN.findall(text)
    parts, rest = _sequence(tokens, stops=("}",))
    if rest:
        raise Malformed("a } without its {; write \\} for a brace that is meant")
    return parts


def _sequence(tokens: list[str], *, stops: tuple[str, ...]) -> tuple[Text, list[str]]:
    """The parts up to one of the tokens that stop them, and the tokens from there."""
    parts: list[str | Name | Choice] = []
    while tokens and tokens[0] not in stops:
        token, tokens = tokens[0], tokens[1:]
        part: str | Name | Choice = token
        if token == "{":
            part, tokens = _choice(tokens)
        elif token.startswith("\\") and len(token) > 1:
            part = token[1:]
        elif len(token) > 4 and token.startswith("__"):
            part = Name(token[2:-2])
        parts += [part] if part else []
    return tuple(parts), tokens


def _choice(tokens: list[str]) -> tuple[Choice, list[str]]:
    """What follows a `{`, and the tokens behind its `}`."""
    (low, high, joiner), tokens = _count(tokens)
    options = []
    while True:
        weight = WEIGHT.match(tokens[0]) if tokens else None
        if weight:
            tokens = [tokens[0][weight.end() :], *tokens[1:]]
        text, tokens = _sequence(tokens, stops=("|", "}"))
        if not tokens:
            raise Malformed("a { without its }; write \\{ for a brace that is meant")
        options.append((float(weight[1]) if weight else 1.0, text))
        end, tokens = tokens[0], tokens[1:]
        if end == "}":
            break
    if not any(weight for weight, _ in options):
        raise Malformed("every weight is 0")
    return Choice(tuple(options), low, len(options) if high is None else high, joiner), tokens


def _count(tokens: list[str]) -> tuple[tuple[int, int | None, str], list[str]]:
    """How many are chosen (to None: all), what is put between them, and the tokens behind."""
    found = COUNT.match(tokens[0]) if tokens else None
    if not found:
        return (1, 1, ", "), tokens
    low, dash, high, joiner = found.groups()
    least = int(low or 1)
    most = (int(high) if high else None) if dash else least
    if most is not None and most < least:
        raise Malformed(f"{found[0]}: the second number is below the first")
    return (least, most, ", " if joiner is None else joiner), [tokens[0][found.end() :], *tokens[1:]]


def _written(text: Text, numbers: Iterator[float], files: Files, depth: int) -> str:
    return "".join(part if isinstance(part, str) else _chosen(part, numbers, files, depth) for part in text)


def _chosen(part: Name | Choice, numbers: Iterator[float], files: Files, depth: int) -> str:
    if depth == 0:
        raise Malformed(f"more than {DEEPEST} choices inside of each other")
    left = list(_options(part, files))
    low, high, joiner = (1, 1, "") if isinstance(part, Name) else (part.low, part.high, part.joiner)
    count = min(low + int(next(numbers) * (high - low + 1)), len(left))
    texts = []
    for _ in range(count):
        _, text = left.pop(_place([weight for weight, _ in left], next(numbers)))
        texts.append(_written(text, numbers, files, depth - 1))
    return texts[0] if count == 1 else joiner.join(text.strip() for text in texts)


def _options(part: Name | Choice, files: Files) -> tuple[Option, ...]:
    """What to choose from; several of one name are several of its lines."""
    if isinstance(part, Name):
        return _lines(part.name, files)
    (_, first), *others = part.options
    only = first[0] if not others and len(first) == 1 else None
    return _lines(only.name, files) if isinstance(only, Name) else part.options


def _place(weights: list[float], number: float) -> int:
    """Where a number, 0..1, falls among weights."""
    ends = list(itertools.accumulate(weights))
    return next((place for place, end in enumerate(ends) if number * ends[-1] < end), len(ends) - 1)


def _files_of(name: str, files: Files) -> list[str]:
    return [other for other in sorted(files) if fnmatch.fnmatchcase(other, name)]


def _lines(name: str, files: Files) -> tuple[Option, ...]:
    found = tuple(line for other in _files_of(name, files) for line in files[other])
    if not found:
        there = ", ".join(sorted(files)[:LISTED]) or "none"
        raise Malformed(f"__{name}__ is no file with lines in data.captions.wildcard_folder; there are: {there}")
    return found


def _names(text: Text) -> Iterator[str]:
    """All that a text names."""
    for part in text:
        if isinstance(part, Name):
            yield part.name
        elif isinstance(part, Choice):
            yield from (name for _, option in part.options for name in _names(option))
