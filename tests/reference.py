"""docs/settings.md: every setting with type, default, range and meaning, from the schema, the YAMLs and signatures."""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from otl import config
from otl.check import SUPPLIED
from otl.choices import CHOICES, WORDED
from otl.config import Settings, conf_dir
from otl.conflicts.training import UNFIT
from otl.ranges import RANGES
from otl.signatures import ANY, describe, signature
from otl.sources import Unclear, bases, find_module, lookup

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
GROUPS = ("task", "captioner", "masker", "model", "method", "optimizer", "scheduler", "trainer", "logger", "callbacks")
COMMENT = re.compile(r"(?:^|\s)# (?P<text>.*)$")
KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w-]+):(?P<rest>.*)$")
SCHEMA = Path(config.__file__).read_text(encoding="utf-8").splitlines()
CLASSES = {node.name: node for node in ast.parse("\n".join(SCHEMA)).body if isinstance(node, ast.ClassDef)}
AS_THERE = "as there"  # of a group that has the fields of another one
INTRODUCTION = """\
# Settings

Written by `python -m tests.reference` from the typed schema (`otl/config.py`), the YAML files (`conf/`), the signatures
that they configure and the ranges (`otl/ranges.py`); a test holds it to them. A setting is written `name=value` on the
command line or in a preset; what each page of [docs](data.md) says of it goes deeper.
"""


class Row(NamedTuple):
    """One setting."""

    name: str  # full, `*` for a name of the user's own
    type: str
    default: str
    meaning: str

    @property
    def range(self) -> str:
        if self.type == AS_THERE:
            return ""
        accepted = [str(range_) for pattern, range_ in RANGES.items() if matches(pattern, self.name)]
        choices = [", ".join(map(str, choices)) for pattern, choices in CHOICES.items() if pattern == self.name]
        return "; ".join(accepted + choices + [text for pattern, text in WORDED.items() if pattern == self.name])


def matches(pattern: str, name: str) -> bool:
    """Whether a key of RANGES is about a setting; `*` stands for one name in either."""
    parts, names = pattern.split("."), name.split(".")
    return len(parts) == len(names) and all(p == n or "*" in (p, n) for p, n in zip(parts, names))


def owned() -> list[Row]:
    """The settings that OTL alone owns."""
    return list(_fields(Settings, ""))


def _fields(kind: type, prefix: str) -> Iterator[Row]:
    comments, hints = field_comments(kind), get_type_hints(kind)
    for field in fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if not prefix and field.name in GROUPS:
            continue
        inner = nested(hint)
        if inner is not None and inner.__name__ not in CLASSES:  # made of another one
            yield Row(f"{name}.*", AS_THERE, AS_THERE, comments.get(field.name, ""))
        elif inner is not None:
            star = ".*" if get_origin(hint) is dict else ""
            if comments.get(field.name):
                yield Row(name, "a group of settings", default_of(field), comments[field.name])
            yield from _fields(inner, f"{name}{star}.")
        else:
            yield Row(name, type_name(hint), default_of(field), comments.get(field.name, ""))


def nested(hint: Any) -> type | None:
    """The dataclass of a field, also as the values of a dict or where null is accepted."""
    for each in (hint, *get_args(hint)):
        if isinstance(each, type) and is_dataclass(each):
            return each
    return None


def field_comments(kind: type) -> dict[str, str]:
    """Field -> the comment beside it."""
    found = {}
    for statement in CLASSES[kind.__name__].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            written_on = SCHEMA[statement.lineno - 1 : statement.end_lineno]
            beside = next(filter(None, map(COMMENT.search, written_on)), None)
            found[statement.target.id] = beside["text"] if beside else ""
    return found


def type_name(hint: Any) -> str:
    """An annotation as a user reads it."""
    if hint is Any:
        return "any"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(member.name for member in hint)
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"mapping to {type_name(get_args(hint)[1])}"
    if type(None) in get_args(hint):
        return " or ".join([type_name(each) for each in get_args(hint) if each is not type(None)] + ["null"])
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(hint, str(hint))


def default_of(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return written(field.default)
    value = field.default_factory() if field.default_factory is not MISSING else None
    return "" if is_dataclass(value) else written(value)


def written(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        value = [each.name if isinstance(each, Enum) else each for each in value]
    if value == "???":
        return "must be given"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def options(group: str) -> list[Path]:
    return sorted((conf_dir() / group).glob("*.yaml"))


def yaml_comments(text: str) -> dict[str, str]:
    """Full key -> the comment on its line."""
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        key = KEY.match(line)
        if key is None:
            continue
        stack = [each for each in stack if each[0] < len(key["indent"])] + [(len(key["indent"]), key["key"])]
        beside = COMMENT.search(key["rest"])
        found[".".join(name for _, name in stack)] = beside["text"] if beside else ""
    return found


def arguments(target: str) -> dict[str, str]:
    """Argument -> its text under "Args:" in the docstrings of a class of OTL's own and its bases, or of a function."""
    module, rest = find_module(target)
    try:
        owner, node = lookup(module, rest[0])
    except Unclear:
        return {}
    found: dict[str, str] = {}
    parents = list(bases(owner, node)) if isinstance(node, ast.ClassDef) else []
    for _, parent in parents:
        found |= arguments_of(ast.get_docstring(parent) or "")
        found |= {} if parent is node else _inherited(parent, owner)
    return found | arguments_of(ast.get_docstring(node) or "")  # type: ignore[arg-type]


def _inherited(node: ast.ClassDef, module: Any) -> dict[str, str]:
    """Of the bases of a base, in whichever of OTL's modules it lies."""
    try:
        owner, _ = lookup(module, node.name)
        return {
            k: v for _, parent in bases(owner, node) for k, v in arguments_of(ast.get_docstring(parent) or "").items()
        }
    except LookupError:
        return {}


def arguments_of(docstring: str) -> dict[str, str]:
    """Google's "Args:" section -> argument -> text."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"\n(?=\S)", textwrap.dedent(section[1]).strip())
    parts = [entry.partition(":") for entry in entries]
    texts = {names: " ".join(text.split()) for names, _, text in parts}
    return {name.strip(): text for names, text in texts.items() for name in names.split(",")}


def called(group: str, path: Path) -> tuple[str, list[Row], list[str]]:
    """An option of a group: its target, the settings that its YAML or OTL documents, and the names of the rest."""
    text = path.read_text(encoding="utf-8")
    values, comments = yaml.safe_load(text) or {}, yaml_comments(text)

    target = values.pop("_target_", "")
    values.pop("defaults", None)  # Hydra's own
    return target, *rows(group, target, values, comments)


def rows(group: str, target: str, values: dict[str, Any], comments: dict[str, str]) -> tuple[list[Row], list[str]]:
    accepted = signature(target).parameters if target else {}
    own = arguments(target) if target.startswith("otl.") else {}
    found, rest = [], []
    for name in dict.fromkeys([*values, *(each for each in accepted if each not in SUPPLIED.get(group, set()))]):
        meaning = comments.get(name) or own.get(name, "")
        if name not in values and not own:
            rest += [] if group == "trainer" and name in UNFIT else [name]
        elif name in values or name in own:
            kind = "" if name not in accepted or ANY[0] in accepted[name].types else describe(accepted[name].types)
            default = written(values[name]) if name in values else ""
            found.append(Row(f"{group}.{name}", kind, default, meaning))
    return found, rest


def callbacks() -> Iterator[tuple[str, list[Row]]]:
    """Name of a callback -> its settings."""
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    comments = yaml_comments(text)
    for name, values in yaml.safe_load(text)["callbacks"].items():
        own = {key.removeprefix(f"callbacks.{name}."): text for key, text in comments.items()}
        target = values.pop("_target_")
        yield name, rows(f"callbacks.{name}", target, values, own)[0]


def table(found: list[Row]) -> str:
    lines = ["| setting | type | default | range | what it is |", "|---|---|---|---|---|"]
    for row in found:
        cells = [f"`{row.name}`", row.type, f"`{row.default}`" if row.default else "", row.range, row.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def of_group(group: str) -> Iterator[str]:
    """What most options of a group share, then each option."""
    read = {path.stem: called(group, path) for path in options(group)}
    count = Counter(row for _, found, _ in read.values() for row in found)
    common = [row for row, times in count.items() if times > max(1, len(read) / 2)]
    if common:
        yield f"### Most options of {group}\n"
        yield table(common)
    for name, (target, found, rest) in read.items():
        own = [row for row in found if row not in common]
        yield f"### `{group}={name}`\n"
        yield table(own) if own else ""
        if rest:
            yield f"And what else `{target}` takes: {', '.join(unlisted(group, target, each) for each in rest)}.\n"


def unlisted(group: str, target: str, name: str) -> str:
    """An argument that no YAML lists, with its type and range as far as they are known."""
    types = signature(target).parameters[name].types
    known = [describe(types)] if ANY[0] not in types else []
    range_ = Row(f"{group}.{name}", "", "", "").range
    return f"`{name}`" + (f" ({'; '.join([*known, *([range_] if range_ else [])])})" if known or range_ else "")


def page() -> str:
    """The whole of docs/settings.md."""
    parts = [INTRODUCTION, "## What OTL owns\n", table(owned())]
    for group in GROUPS[:-1]:
        parts += [f"## {group}\n", *of_group(group)]
    parts.append("## callbacks\n\nEach can be switched off: `callbacks.NAME=null`.\n")
    for name, found in callbacks():
        parts += [f"### {name}\n", table(found) if found else "It has no settings.\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
