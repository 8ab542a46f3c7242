"""Every setting against the signature it configures and its range: all problems at once, before any import of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from otl.augmentation import without_effect
from otl.choices import not_chosen
from otl.config import Problem, SettingsError
from otl.conflicts.data import of_data
from otl.conflicts.method import of_method
from otl.conflicts.model import of_model
from otl.conflicts.objective import of_objective
from otl.conflicts.sources import of_sources
from otl.conflicts.training import of_training
from otl.places import of_places
from otl.ranges import out_of_range
from otl.signatures import Signature, Type, Unknown, describe, fits, signature
from otl.sources import NoSuchName
from otl.trust import refused, secrets
from otl.wording import as_number, as_whole, joined, meant, nearest, show

CALLED = ("task", "model", "method", "optimizer", "scheduler", "trainer", "logger")
OF_TASK = {"captioner": "caption", "masker": "mask"}  # groups that only one task has
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
UNNAMED = ("_partial_", "_args_")  # of these: what would not be a call of which every argument is known

SUPPLIED = {  # by group: the arguments that tasks/train.py and the modules give themselves
    "optimizer": {"params"},
    "scheduler": {"step", "total_steps"},
    "task": {"settings", "cfg", "folder"},
    "trainer": {
        "callbacks",
        "logger",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_checkpointing",
        "use_distributed_sampler",
        "num_sanity_val_steps",
        "log_every_n_steps",
    },
}
OPEN = {"logger"}  # groups where **kwargs reach a library that documents them, such as wandb.init

OWN_MEANING = {"trainer.precision", "trainer.max_steps"}  # read by OTL before the Trainer sees them


def require(cfg: DictConfig) -> None:
    """Refuse settings with any problem.

    Raises:
        SettingsError: lists every problem.
    """
    require_all(check(cfg))


def require_all(problems: Sequence[Problem]) -> None:
    """Raises SettingsError: lists every problem that is fatal."""
    if fatal := [problem for problem in problems if problem.fatal]:
        raise SettingsError(report(fatal))


def report(problems: Sequence[Problem]) -> str:
    """The problems as text, one paragraph each."""
    lines = []
    for problem in problems:
        lines.append(f"{problem.key}: {problem.message}")
        lines.extend(f"    {detail}" for detail in problem.details)
    return "\n".join(lines)


def check(cfg: DictConfig) -> list[Problem]:
    """All that is wrong with composed settings, as far as it can be told without torch."""
    problems = list(_untyped(cfg, ""))
    settings = {name: group for name, group in _plain(cfg, "", problems).items() if group is not Unknown}
    for group in (*CALLED, "experiment"):
        if settings.get(group) is not None and isinstance(settings[group], dict) is (group == "experiment"):
            problems.append(_no_group(group, settings.pop(group)))
    for key, node in _dicts(settings, ""):
        if "_target_" in node:
            problems += _check_call(key, node)
    for name, node in (settings.get("callbacks") or {}).items():
        if isinstance(node, dict) and "_target_" not in node:
            problems.append(_no_callback(name, node, settings["callbacks"]))
        elif node is not None and not isinstance(node, dict):
            message = f"{show(node)} is not accepted: must be a mapping of its settings, or null for none"
            problems.append(Problem(f"callbacks.{name}", message))
    for group in CALLED:
        if isinstance(settings.get(group), dict) and settings[group] and "_target_" not in settings[group]:
            name, value = next(iter(settings[group].items()))
            message = f"{show(value)} is given, but no {group} is chosen: choose one with {group}=NAME"
            problems.append(Problem(f"{group}.{name}", message))
    for group, task in OF_TASK.items():
        if settings.get(group) and "_target_" not in settings[group]:
            name, value = next(iter(settings[group].items()))
            problems.append(Problem(f"{group}.{name}", f"{show(value)} would have no effect: it needs task={task}"))
    problems += secrets(settings)
    problems += _unless_known([*out_of_range(settings), *not_chosen(settings)], problems)
    data = settings.get("data") or {}
    found = [*of_objective(settings), *without_effect(data), *of_places(settings)]
    found += [*of_data(data), *of_sources(settings), *of_training(settings)]
    problems += _unless_known(found, problems)
    if not any(problem.key.startswith(("method", "model")) for problem in problems):  # else they have no types to trust
        problems += of_method(settings)
    known = {problem.key for problem in problems}
    problems += _unless_known(list(of_model(settings, known)), problems)
    return problems


def _no_group(group: str, given: Any) -> Problem:
    """A preset that gives a group's option as a value, or that does not begin as one has to."""
    if group == "experiment":
        message = "would have no effect: the first line of a preset is '# @package _global_'; add it"
        return Problem(group, f"{', '.join(map(str, given))} {message}")
    message = f"{show(given)} is no mapping of its settings; a preset chooses it in its defaults, '- override /{group}:"
    return Problem(group, f"{message} {show(given)}'")


def _unless_known(found: list[Problem], problems: list[Problem]) -> list[Problem]:
    """Those of settings of which nothing is said yet: one mistake, one message."""
    known = {problem.key for problem in problems}
    return [problem for problem in found if problem.key not in known]


def _plain(node: DictConfig | ListConfig, prefix: str, problems: list[Problem]) -> Any:
    """Plain containers with interpolations resolved; what is missing or cannot be resolved becomes a problem."""
    if isinstance(node, ListConfig):
        return [_value(node, index, f"{prefix}[{index}]", problems) for index in range(len(node))]
    if node._is_none() or node._is_missing():
        return None
    return {str(key): _value(node, key, joined(prefix, key), problems) for key in node}


def _value(parent: Any, key: Any, full: str, problems: list[Problem]) -> Any:
    if OmegaConf.is_missing(parent, key):
        problems.append(Problem(full, f"must be given: {full}=..."))
        return Unknown
    if OmegaConf.is_interpolation(parent, key):
        text = str(parent._get_node(key)._value())
        if "${hydra:" in text:
            return Unknown  # known once the run has a folder
        try:
            value = parent[key]
        except OmegaConfBaseException as error:
            problems.append(Problem(full, f"{text} cannot be resolved: {str(error).splitlines()[0]}"))
            return Unknown
    else:
        value = parent[key]
    return _plain(value, full, problems) if isinstance(value, DictConfig | ListConfig) else value


def _dicts(node: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dict of the settings with its full key, outer ones first."""
    if isinstance(node, dict):
        yield prefix, node
        for key, value in node.items():
            yield from _dicts(value, joined(prefix, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _dicts(value, f"{prefix}[{index}]")


def _untyped(node: DictConfig, prefix: str) -> Iterator[Problem]:
    """Keys that `++` forced into the typed settings, and lists in lists of texts."""
    kind = OmegaConf.get_type(node)
    known = [one.name for one in fields(kind)] if is_dataclass(kind) else None
    for name in known or ():
        if name not in node:
            message = "cannot be taken away, because OTL reads it: leave it out, or give it another value"
            yield Problem(joined(prefix, name), message)
    for key in node:
        full = joined(prefix, key)
        if known is not None and key not in known:
            hint = nearest(str(key), known)
            hint = "; did you mean " + f"{prefix}.{hint}".lstrip(".") + "?" if hint else ""
            given = f"there is no such setting (given: {show(_raw(node, key))}){hint}"
            yield Problem(full, given, details=[f"accepted in {prefix or 'the settings'}: {', '.join(known)}"])
        elif isinstance(child := node._get_node(key), ListConfig) and _holds_lists(child):
            yield Problem(full, f"{show(_raw(node, key))} is not accepted: must be a list of texts")
        elif isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            yield from _untyped(child, full)


def _holds_lists(node: ListConfig) -> bool:
    """Whether a list of texts has something else in it, which OmegaConf would take."""
    if node._is_none() or node._is_missing():
        return False
    return node._metadata.element_type is str and any(isinstance(each, DictConfig | ListConfig) for each in node)


def _raw(node: DictConfig, key: Any) -> Any:
    plain: Any = OmegaConf.to_container(node, resolve=False)
    return plain[key]


def _check_call(key: str, node: dict[str, Any]) -> list[Problem]:
    """The keys and values of one dict with a `_target_` against what that takes."""
    target = node["_target_"]
    if not isinstance(target, str):
        return [] if target is Unknown else [Problem(f"{key}._target_", f"{target!r} is not a dotted name")]
    if refusal := refused(key, target):
        return [refusal]
    if odd := [name for name in UNNAMED if node.get(name)]:
        message = (
            f"{show(node[odd[0]])} has no place here: what is called is called whole, with arguments by their names"
        )
        return [Problem(f"{key}.{odd[0]}", message)]
    try:
        accepted = signature(target)
    except NoSuchName as error:
        absent = str(error).rpartition(" ")[2]
        return [Problem(f"{key}._target_", f"{target} does not exist: {error}{meant(absent, error.known)}")]
    except Exception as error:
        return [Problem(f"{key}._target_", f"{target} cannot be imported: {type(error).__name__}: {error}")]
    return _check_arguments(key, node, target, accepted)


def _check_arguments(key: str, node: dict[str, Any], target: str, accepted: Signature) -> list[Problem]:
    group = key.partition(".")[0]
    supplied = SUPPLIED.get(group, set())
    names = [name for name in accepted.parameters if name not in supplied]
    given = {name: value for name, value in node.items() if name not in HYDRA_KEYS}
    problems = []
    for name, value in given.items():
        full = f"{key}.{name}"
        if name in supplied:
            problems.append(Problem(full, f"{show(value)} is given, but OTL sets it itself: leave it out"))
        elif name in accepted.parameters:
            problems += [] if full in OWN_MEANING else _check_type(full, value, accepted.parameters[name].types)
        elif not (accepted.open and group in OPEN and not nearest(name, names, 0.8)):
            problems.append(_unknown(full, value, target, names))
    missing = [name for name in names if accepted.parameters[name].required and name not in given]
    return problems + [Problem(f"{key}.{name}", f"must be given: {target} needs it") for name in missing]


def _unknown(full: str, value: Any, target: str, names: Sequence[str]) -> Problem:
    parent, _, name = full.rpartition(".")
    close = nearest(name, names)
    hint = f"; did you mean {parent}.{close}?" if close else ""
    accepts = f"{target} takes {', '.join(names) or 'no settings'}"
    return Problem(full, f"there is no such setting (given: {show(value)}){hint}", details=[accepts])


def _no_callback(name: str, node: dict[str, Any], callbacks: dict[str, Any]) -> Problem:
    others = [other for other, value in callbacks.items() if isinstance(value, dict) and "_target_" in value]
    close = nearest(name, others)
    hint = f"; did you mean callbacks.{close}?" if close else "; a new one needs a _target_"
    key = "".join([f"callbacks.{name}", *(f".{key}" for key in list(node)[:1])])
    value = next(iter(node.values()), None)
    return Problem(
        key, f"there is no callback {name} (given: {show(value)}){hint}", details=[f"there are: {', '.join(others)}"]
    )


def _check_type(key: str, value: Any, types: tuple[Type, ...]) -> list[Problem]:
    if value is Unknown or any(fits(value, one) for one in types):
        return []
    if isinstance(value, dict) and "_target_" in value:
        return []
    if isinstance(value, str) and any(t.kind in {"int", "float"} for t in types):
        number = as_number(value)
        if number is not None:
            return [Problem(key, f"{value!r} is text in YAML: write {number}")]
    choices = [choice for one in types for choice in one.choices]
    whole = as_whole(value) if Type("int") in types else ""
    return [Problem(key, f"{show(value)} is not accepted: must be {describe(types)}{meant(value, choices) or whole}")]
