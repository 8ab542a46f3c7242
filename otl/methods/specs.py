"""What `method.embeddings` says of each embedding."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from otl.config import SettingsError
from otl.epochs import ACCEPTED, StopAfter, is_stop
from otl.wording import meant, show

NAME = re.compile(r"[A-Za-z0-9_-]+")  # becomes a file's name


@dataclass
class Spec:
    """One embedding, as `method.embeddings.<name>` describes it."""

    name: str
    placeholder: str  # the word in captions and prompts; left out: <name>
    vectors: int | None = None  # tokens that it takes in a prompt; None: as many as `file` or `init` has, else 1
    init: str | None = None  # the words it starts as; None: random, like the vocabulary
    file: str | None = None  # an embedding to go on from
    lr: float | None = None  # learning rate; None: the optimizer's own
    stop_after: StopAfter | None = None  # steps, a share of the run below 1, or epochs, after which it stays as it is
    output: bool = False  # whether its vectors are put in after the text encoder instead of before
    preserve_norm: bool = True  # whether its vectors are kept as long as the vocabulary's

    @property
    def key(self) -> str:
        """The setting."""
        return f"method.embeddings.{self.name}"


KINDS: dict[str, Any] = {  # field -> what it takes, None aside
    "placeholder": str,
    "vectors": int,
    "init": str,
    "file": str,
    "lr": float,
    "stop_after": StopAfter,
    "output": bool,
    "preserve_norm": bool,
}
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", StopAfter: ACCEPTED}


def parse(settings: dict[str, Any] | None) -> dict[str, Spec]:
    """name -> its embedding.

    Raises:
        SettingsError: a field that does not exist or has a wrong value, or two embeddings with one placeholder.
    """
    specs = {str(name): spec(str(name), given or {}) for name, given in (settings or {}).items()}
    refuse_twins(specs.values())
    return specs


def require(specs: Collection[str], asked: str) -> None:
    """Raises SettingsError: there is no embedding, and `asked`, a setting, is for some."""
    if not specs:
        ways = "give one and the word it starts as, method.embeddings.NAME.init=WORD"
        raise SettingsError(f"{asked}: there are no embeddings; {ways}")


def refuse_name(specs: Collection[str], result: str) -> None:
    """Raises SettingsError: an embedding's file would have the name of the run's result."""
    if result in specs:
        raise SettingsError(
            f"method.embeddings.{result}: output.name={result} already names the run's result: rename one of them"
        )


def require_file(each: Spec) -> None:
    """Raises SettingsError: the file that an embedding goes on from is not there."""
    if each.file is not None and not Path(each.file).expanduser().is_file():
        raise SettingsError(f"{each.key}.file={each.file}: there is no such file")


def require_room(each: Spec, count: int, *, room: int) -> None:
    """Raises SettingsError: an embedding has more vectors than a prompt has room for tokens."""
    if count > room:
        raise SettingsError(f"{each.key}.vectors={count}: a prompt has room for {room} tokens; give fewer")


def spec(name: str, given: Any) -> Spec:
    """One embedding of its settings."""
    key = f"method.embeddings.{name}"
    known = [field.name for field in fields(Spec) if field.name != "name"]
    if not isinstance(given, dict):
        raise SettingsError(
            f"{key}={show(given)}: give its fields, such as {key}.init=WORD; there are: {listed(known)}"
        )
    if not NAME.fullmatch(name):
        raise SettingsError(f"{key}: the name becomes a file's name: use letters, digits, - and _ only")
    for field, value in given.items():
        if field not in known:
            hint = meant(field, known)
            raise SettingsError(f"{key}.{field}={show(value)}: no such setting{hint}; there are: {listed(known)}")
        if value is not None and not fits(value, KINDS[field]):
            raise SettingsError(f"{key}.{field}={show(value)}: must be {WORDS[KINDS[field]]}")
    found = Spec(name, **{"placeholder": f"<{name}>"} | {k: v for k, v in given.items() if v is not None})
    if found.vectors is not None and found.vectors < 1:
        raise SettingsError(f"{key}.vectors={found.vectors}: must be at least 1")
    if found.init is not None and found.file is not None:
        raise SettingsError(f"{key}: init={found.init} and file={found.file} both say how it starts: leave out one")
    if not found.placeholder.strip() or found.placeholder != found.placeholder.strip():
        raise SettingsError(f"{key}.placeholder={found.placeholder!r}: give a word without spaces around it")
    return found


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is of a kind; true and false are no numbers."""
    if kind is StopAfter:
        return is_stop(value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def refuse_twins(specs: Iterable[Spec]) -> None:
    """Raises SettingsError: two embeddings have one placeholder."""
    owners: dict[str, str] = {}
    for each in specs:
        other = owners.setdefault(each.placeholder, each.name)
        if other != each.name:
            raise SettingsError(
                f"{each.key}.placeholder={each.placeholder}: the embedding {other} has the same one; give each its own"
            )


def pattern(specs: Iterable[Spec]) -> re.Pattern[str]:
    """What finds any of the placeholders in a caption, the longest first; never in the middle of a word."""
    placeholders = sorted((each.placeholder for each in specs), key=len, reverse=True)
    return re.compile("|".join(map(bounded, placeholders)) or r"(?!)")


def bounded(word: str) -> str:
    """The expression for a word that is not part of a longer one."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return before + re.escape(word) + after


def listed(names: list[str]) -> str:
    return ", ".join(names)
