"""From an error of Hydra or OmegaConf to what the person typed, what is accepted there, and what was probably meant."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from enum import EnumType
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from omegaconf.nodes import BooleanNode, EnumNode, FloatNode, IntegerNode, StringNode

from otl.aliases import ALIASES, OPTIONS
from otl.check import OF_TASK, check
from otl.config import Concept, Problem, conf_dir
from otl.registry import plugin_conf_dirs
from otl.signatures import signature
from otl.sources import NoSuchName
from otl.sweeps import groups_in, jobs
from otl.wording import as_whole, joined, meant, nearest, show

CONCEPT = re.compile(r"(data\.concepts\.[^.]+)\.([\w.]+)")
CONCEPT_ITSELF = re.compile(r"data\.concepts\.[^.]+")
COMPOSING = (HydraException, OmegaConfBaseException, ValueError)  # ValueError: of an option that is no text, by Hydra
EXPECTED = (
    (BooleanNode, "true or false"),
    (IntegerNode, "a whole number"),
    (FloatNode, "a number"),
    (StringNode, "one text"),
)


def compose_settings(
    overrides: Sequence[str], *, name: str, extra: str | None = None, folder: str | None = None, hydra: bool = False
) -> DictConfig:
    """The settings of one job.

    Args:
        overrides: as on the command line.
        name: of the primary config.
        extra: a further folder of configs, as in --config-dir.
        folder: of the primary config; None: OTL's own.
        hydra: whether Hydra's own settings are among them.
    """
    searched = [f"hydra.searchpath=[file://{Path(extra).absolute()}]"] if extra else []
    with initialize_config_dir(folder or str(conf_dir()), job_name="otl", version_base="1.3"):
        return compose(name, [*overrides, *searched], return_hydra_config=hydra)


def explain_flags(flags: Sequence[str]) -> Iterator[Problem]:
    """Words of the command line that are neither a flag of Hydra's nor a setting."""
    names = _names(compose_settings([], name="config"))
    for flag in flags:
        key, _, value = flag.lstrip("-").partition("=")
        close = meant_key(key, names)
        form = close if close and "=" in close else f"{close or 'name'}={value or 'value'}"
        yield Problem(flag, f"settings are written as name=value, without dashes; did you mean {form}?")


def explain(
    error: BaseException, overrides: Sequence[str], *, name: str, extra: str | None, sweeps: bool
) -> list[Problem]:
    """Everything wrong with a command line that cannot be composed; the error's own words where nothing is found."""
    cause = _root_cause(error)
    if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
        mark = cause.problem_mark
        where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}"
        return [Problem(where, f"this is not YAML: {cause.problem}")]
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file == name:
        return [Problem("--config-name", f"{name}: there is no {name}.yaml in the folder of --config-path")]
    words = [text for text in overrides if text.startswith("=") or ("=" not in text and text[:1] != "~")]
    problems = [_loose(words)] if words else []
    accepted: list[str] = []
    for text in overrides:
        if text in words:
            continue
        found = list(_explain_override(text, accepted, name, extra, sweeps))
        problems += found
        accepted += [] if found else next(jobs([text], groups_in(extra)), [])  # of a sweep the first value
    if problems:
        known = {problem.key for problem in problems}
        return problems + [p for p in check(compose_settings(accepted, name=name, extra=extra)) if p.key not in known]
    return [Problem("settings", " ".join((str(error) or str(cause)).split()))]


def _loose(words: list[str]) -> Problem:
    """Words of the line that are no settings: the rest of a value without quotes, or a setting with spaces in it."""
    message = "a setting is written name=value, without spaces around the =; one whose value has spaces in quotes"
    return Problem(" ".join(words), f"{message}, 'data.prompt=\"a photo of a dog\"'")


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain_override(text: str, accepted: list[str], name: str, extra: str | None, sweeps: bool) -> Iterator[Problem]:
    """What is wrong with one override beside those already accepted."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = " ".join(str(error).split("\n")[0].split())
        typed, _, value = text.removeprefix("++").partition("=")  # which OTL itself may have put there
        inner = value.strip().replace('"', '\\"')
        quoted = shlex.quote(f'{typed}="{inner}"')
        yield Problem(typed, f"{value} cannot be read: quote what has special characters twice, {quoted} ({reason})")
        return
    if override.is_sweep_override() and not sweeps:
        key, value = override.key_or_group, text.partition("=")[2]
        ways = f"add --multirun, or quote it: {key}=[{value}] as a list, '{key}=\"{value}\"' as text"
        if re.fullmatch(r"-?0,\d+", value):
            ways += f"; did you mean {key}={value.replace(',', '.')}?"
        yield Problem(key, f"{value} are values to sweep over: {ways}")
        return
    for (one,) in jobs([text], groups_in(extra)):
        try:
            compose_settings([*accepted, one], name=name, extra=extra)
        except COMPOSING as error:
            yield _reason(error, OverridesParser.create().parse_override(one), accepted, name, extra)
            return


def _reason(error: Exception, override: Override, accepted: list[str], name: str, extra: str | None) -> Problem:
    key, value = override.key_or_group, _text(override)
    with initialize_config_dir(str(conf_dir()), job_name="otl", version_base="1.3"):
        options = _options(GlobalHydra.instance().config_loader(), key, extra)
    if options and value not in options:
        message = f"{value} is none of its options{_option_meant(key, value, options)}"
        return Problem(key, message, details=[f"there are: {', '.join(options)}"])
    if options and key in OF_TASK:
        return Problem(key, f"{value} would have no effect: it needs task={OF_TASK[key]}")
    cause = _root_cause(error)
    if options:
        return _of_option(key, value, cause, accepted, name, extra)
    if isinstance(override.value(), dict) and isinstance(cause, OmegaConfBaseException) and cause.full_key:
        key, value = _inside(override, cause.full_key.partition("[")[0])  # of a list it is the whole that is refused
    settings = compose_settings(accepted, name=name, extra=extra, hydra=key.startswith("hydra."))
    if CONCEPT_ITSELF.fullmatch(key):
        return Problem(key, f"{value} is not accepted: give its fields, such as {key}.path=photos/")
    node = _node(settings, key)
    if isinstance(cause, ConfigKeyError | AttributeError) or node is None:
        return _unknown_key(key, value, settings, cause)
    if override.is_add() and not override.is_force_add():
        return Problem(key, f"+{key} adds a setting that is not there yet, and this one is: leave the + out")
    if override.is_delete():
        return Problem(key, "cannot be taken away, because OTL reads it: leave it out, or give it another value")
    expected = _expected(node)
    if expected:
        choices = expected if isinstance(expected, list) else []
        accepts = ", ".join(choices) if choices else expected
        hint = meant(value, choices) or (as_whole(override.value()) if isinstance(node, IntegerNode) else "")
        if isinstance(node, ListConfig) and isinstance(override.value(), str) and not hint:
            hint = f"; did you mean '{key}=[\"{override.value()}\"]'?"
        return Problem(key, f"{value} is not accepted: must be {accepts}{hint}")
    return Problem(key, f"{value} is not accepted: {str(cause).splitlines()[0]}")


def _option_meant(group: str, value: str, options: list[str]) -> str:
    """A hint at another option, or at the setting that weights are given by."""
    if group == "model" and ("/" in value or value.endswith(".safetensors")):
        return f", which are families: weights are given beside one of them, by model.checkpoint={value}"
    return f"; did you mean {OPTIONS[value]}?" if OPTIONS.get(value) in options else meant(value, options)


def _of_option(
    key: str, value: str, cause: BaseException, accepted: list[str], name: str, extra: str | None
) -> Problem:
    """What is wrong inside of the YAML that an option is."""
    where = f"{key}={value}"
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
        group, _, absent = str(cause.missing_cfg_file).rpartition("/")
        there = list(cause.options or [])
        message = f"its {group} is {absent}, which is none of the options{meant(absent, there)}"
        return Problem(where, message, details=[f"there are: {', '.join(there)}"])
    first, *others = str(cause).splitlines()
    wrong = next((line.partition("full_key: ")[2] for line in others if "full_key: " in line), None)
    if wrong is None or "Key '" not in others[0]:
        return Problem(where, " ".join(others[:1]) or first)
    close = meant_key(wrong, _names(compose_settings(accepted, name=name, extra=extra)))
    hint = f"; did you mean {close}?" if close else ""
    return Problem(where, f"its {wrong}: there is no such setting (given: {_given(key, value, wrong, extra)}){hint}")


def _given(group: str, option: str, key: str, extra: str | None) -> str:
    """What the YAML of an option says for a full name."""
    folders = [*([Path(extra)] if extra else []), conf_dir(), *plugin_conf_dirs()]
    file = next(path for folder in folders if (path := folder / group / f"{option}.yaml").is_file())
    said: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    for part in key.removeprefix(f"{group}.").split("."):
        said = said[part]
    return show(said)


def _inside(override: Override, key: str) -> tuple[str, str]:
    """What of a nested override is wrong, and its value.

    Args:
        key: the full name in the error, which may be that of the whole: then as far down as there is no choice.
    """
    found, value = override.key_or_group, override.value()
    parts = key.removeprefix(f"{found}.").split(".") if key != found else []
    while parts or (_goes_on(key, found, override) and isinstance(value, dict) and len(value) == 1):
        part = parts.pop(0) if parts else next(iter(value))
        found, value = f"{found}.{part}", value[part]
    return found, show(value)


def _goes_on(key: str, found: str, override: Override) -> bool:
    """Whether the error names something that the mistake lies in: the whole, or a concept."""
    return key == override.key_or_group or bool(CONCEPT_ITSELF.fullmatch(found))


def _text(override: Override) -> str:
    return override.get_value_element_as_str() if override.value_type is not None else show(override.value())


def _options(loader: ConfigLoader, group: str, extra: str | None) -> list[str]:
    """Those of OTL, of plugins, and of the folder of --config-dir."""
    if "." in group:
        return []
    own = (path.stem for path in Path(extra, group).glob("*.yaml")) if extra else ()
    return sorted({*loader.get_group_options(group), *own})


def _unknown_key(key: str, value: str, settings: DictConfig, cause: BaseException) -> Problem:
    names = _names(settings)
    concept = CONCEPT.fullmatch(key)
    if concept:  # of one that is not there yet
        names = list(dict.fromkeys([*names, concept[1], *_walk(OmegaConf.structured(Concept), concept[1])]))
    close = meant_key(key, names)
    hint = f"; did you mean {close}?" if close else ""
    parent = key.rpartition(".")[0]
    while parent and parent not in names:
        parent = parent.rpartition(".")[0]
    depth = parent.count(".") + 1 if parent else 0
    inside = [n for n in names if n.count(".") == depth and (not parent or n.startswith(f"{parent}."))]
    accepts = f"{parent or 'the settings'}: {', '.join(n.rpartition('.')[2] for n in inside)}"
    return Problem(key, f"there is no such setting (given: {value}){hint}", details=[f"accepted in {accepts}"])


def meant_key(key: str, names: Sequence[str]) -> str | None:
    """The full name that was probably meant by a wrong one."""
    parent, _, leaf = key.rpartition(".")
    leaf = leaf.replace("-", "_").casefold()
    if leaf in ALIASES:
        return ALIASES[leaf]
    siblings = [name for name in names if name.rpartition(".")[0] == parent]
    exact = sorted((name for name in names if name.rpartition(".")[2] == leaf), key=lambda name: name.count("."))
    close = nearest(key, siblings) if parent and siblings else None
    return close or (exact[0] if exact else None) or nearest(key, names) or _nearest_leaf(leaf, names)


def _nearest_leaf(leaf: str, names: Sequence[str]) -> str | None:
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = nearest(leaf, [*leaves, *ALIASES])
    return leaves.get(close, ALIASES.get(close)) if close else None


def _names(settings: DictConfig) -> list[str]:
    """The full name of every setting, those of signatures that no YAML lists too."""
    return list(dict.fromkeys(_walk(settings, "")))


def _walk(node: DictConfig, prefix: str) -> Iterator[str]:
    for key in node:
        full = joined(prefix, key)
        yield full
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _walk(child, full)
    target = OmegaConf.to_container(node, resolve=False).get("_target_")  # type: ignore[union-attr]
    if isinstance(target, str):
        try:
            yield from (f"{prefix}.{name}" for name in signature(target).parameters)
        except (NoSuchName, ImportError):
            return  # check.py says so


def _node(settings: DictConfig, key: str) -> Node | None:
    """The node of a full name; None where there is none."""
    node: Any = settings
    concept = CONCEPT.fullmatch(key)
    if concept:
        node, key = OmegaConf.structured(Concept), concept[2]
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node._content:  # type: ignore[operator]
            return None
        node = node._get_node(part)
    return node


def _expected(node: Node) -> str | list[str]:
    """What a typed setting takes, in words or as its choices."""
    if isinstance(node, EnumNode):
        return [member.name for member in node.enum_type]
    if isinstance(node, ListConfig):
        element = node._metadata.element_type
        return f"a list of {', '.join(element.__members__)}" if isinstance(element, EnumType) else "a list"
    if isinstance(node, DictConfig):
        return "a mapping of its settings"
    return next((words for kind, words in EXPECTED if isinstance(node, kind)), "")
