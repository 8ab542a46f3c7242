"""`otl` and `python -m otl`: composes the settings with Hydra, checks them, and calls the task. Imports no torch."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from otl import outcomes
from otl.apart import FORWARDED, apart, told
from otl.callbacks.stops import at_once
from otl.check import check, report, require, require_all
from otl.config import Problem, RunEnded, SettingsError, conf_dir, register
from otl.mistakes import COMPOSING, compose_settings, explain, explain_flags
from otl.outcomes import Outcome
from otl.overrides import misread, of_hydra, of_ranks
from otl.quiet import quiet_libraries, quiet_ranks, speaks
from otl.registry import plugin_conf_dirs
from otl.sweeps import groups_in, jobs, parted, queued, unswept
from otl.trust import DISK, hide, hide_logged, hide_uncaught, hydra_calls, known_tokens, secrets

CONFIG_NAME = "config"
UNREACHED = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
CALLED = re.compile(r"(task|model|method|optimizer|scheduler|trainer|logger|callbacks|captioner|masker)\.[\w.]+=")
CONCEPT = re.compile(r"data\.concepts\.(?P<name>[\w-]+)\.(?P<field>[\w.]+)=(?P<value>.*)", re.DOTALL)


class PluginConf(SearchPathPlugin):
    """Adds the `conf/` folders of plugins to Hydra's search path, as files: packages would have to be imported."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in plugin_conf_dirs():
            search_path.append("otl-plugin", f"file://{folder}")


def main() -> None:
    """The whole command line; exits with 2 and a message where the person who typed it can mend it."""
    hide_uncaught()
    hide_logged()
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing its own message
    register()
    Plugins.instance().register(PluginConf)
    arguments = sys.argv[1:]
    try:
        arguments = sys.argv[1:] = spelled_out(arguments)
        check_line(arguments)
        hydra.main(config_path=config_path(arguments), config_name=CONFIG_NAME, version_base="1.3")(job)()
    except Exception as error:
        message = explained(error, arguments)
        if message is None or wants_traceback:
            raise
        sys.exit(message_and_code(message))


def job(cfg: DictConfig) -> None:
    """One run: of a sweep, or the only one."""
    if HydraConfig.get().mode == RunMode.MULTIRUN and speaks():
        return one_of_many(cfg)
    try:
        run(cfg)
    except Exception as error:  # here, because Hydra adds a line of its own to what passes through it
        if isinstance(error, RunEnded):  # on all ranks alike
            if not speaks():
                sys.exit(0)  # Lightning would kill the first, which is not done, for any other code
            sys.stderr.write(f"{hide(str(error), known_tokens())}\n")
            sys.exit(error.exit_code)
        message = refusal(error)
        if message is None:
            raise
        sys.exit(message_and_code(message))


def run(cfg: DictConfig) -> None:
    """Check once more, and call the task."""
    require(cfg)
    require_all(harmful(OmegaConf.create({"hydra": HydraConfig.get()}).hydra))
    quiet_libraries()
    quiet_ranks()
    task = hydra.utils.get_method(cfg.task._target_)
    with at_once():
        task(cfg, **options(cfg.task))


def one_of_many(cfg: DictConfig) -> None:
    """One job of a sweep, in a process of its own: it may fail, or be killed where memory runs out, and the next one
    runs all the same. A signal to stop ends the whole sweep."""
    running, started = HydraConfig.get(), time.monotonic()
    folder = Path(running.runtime.output_dir)
    (folder / outcomes.FILE).unlink(missing_ok=True)  # of an earlier sweep in the same folder
    code = apart(partial(attempt, cfg))
    if code - 128 in FORWARDED:
        sys.stderr.write("the rest of the sweep was not started\n")
        sys.exit(code)
    if not (folder / outcomes.FILE).is_file():
        logging.getLogger(__name__).error(told(code))
        line, spent = list(running.overrides.task), time.monotonic() - started
        outcomes.write(Outcome(int(running.job.num), line, "failed", told(code), spent), folder)


def attempt(cfg: DictConfig) -> None:
    """One job of a sweep, whose outcome is written down."""
    running, started = HydraConfig.get(), time.monotonic()
    outcome, message = "finished", ""
    try:
        run(cfg)
    except Exception as error:
        if isinstance(error, RunEnded) and error.exit_code > 128:
            sys.stderr.write(f"{hide(str(error), known_tokens())}\n")
            sys.exit(error.exit_code)
        why = str(error) if isinstance(error, RunEnded) else refusal(error)
        outcome, message = "failed" if refusal(error) is None else "refused", why or f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).error(why or traceback.format_exc())
    line, message = list(running.overrides.task), hide(message, known_tokens())
    ended = Outcome(int(running.job.num), line, outcome, message, time.monotonic() - started)
    outcomes.write(ended, Path(running.runtime.output_dir))


def options(task: DictConfig) -> dict[str, Any]:
    """What a task is called with besides the settings: its own keys, as plain values."""
    plain: Any = OmegaConf.to_container(task, resolve=True)
    return {name: value for name, value in plain.items() if name != "_target_"}


def message_and_code(message: str) -> int:
    """Print what is wrong; 2 is the exit code of a wrong command line."""
    sys.stderr.write(f"{hide(message, known_tokens())}\n")
    return 2


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra needs it: flags first, and `++` before settings that a YAML may not list yet."""
    settings = [text for text in arguments if "=" in text and not text.startswith("-")]
    flags = [text for text in arguments if text not in settings]
    concepts = [found for found in map(CONCEPT.fullmatch, settings) if found]
    if {"-m", "--multirun"} & set(flags):  # Hydra's sweeper keeps one setting of a name
        folders = groups_in(get_args_parser().parse_known_args(flags)[0].config_dir)
        settings = [queued(text, folders) for text in settings]
        settings = [text for text in settings if not CONCEPT.fullmatch(text)]
        return flags + [_spelled_out(text) for text in settings] + ([merged(concepts)] if concepts else [])
    return flags + [_spelled_out(text) for text in settings]


def _spelled_out(setting: str) -> str:
    if setting.startswith("+experiment="):
        return setting[1:]
    concept = CONCEPT.fullmatch(setting)
    if concept:
        return merged([concept])
    return f"++{setting}" if CALLED.match(setting) else setting


def merged(concepts: Sequence[re.Match[str]]) -> str:
    """One setting for all: Hydra cannot add a field to a concept that does not exist yet, but it can merge one.

    Values to sweep over become a sweep over all of it.

    Raises:
        SettingsError: a group of fields is given whole and in parts.
    """
    together = product(*(_swept(concept["value"]) for concept in concepts))
    names = [[concept["name"], *concept["field"].split(".")] for concept in concepts]
    return "++data.concepts=" + ",".join(_braced(_nested(names, values)) for values in together)


def _swept(value: str) -> list[str]:
    """The values of a sweep, each as it was typed; of anything else the one."""
    try:
        override = OverridesParser.create().parse_override(f"value={value}")
    except HydraException:
        return [value]  # its mistake is explained where everything is composed
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else [value]


def _nested(names: Sequence[Sequence[str]], values: Sequence[str]) -> dict[str, Any]:
    """Names in parts and their values -> as deep as the names."""
    found: dict[str, Any] = {}
    for (*groups, field), value in zip(names, values):
        node = found
        for group in groups:
            node = node.setdefault(group, {})
            if isinstance(node, str):
                name = ".".join(["data.concepts", *groups])
                raise SettingsError(f"{name}: given whole and in parts ({name}.{field}={value}): give one of them")
        node[field] = value
    return found


def _braced(node: dict[str, Any] | str) -> str:
    """As Hydra writes a mapping."""
    return node or '""' if isinstance(node, str) else f"{{{', '.join(f'{key}: {_braced(node[key])}' for key in node)}}}"


def config_path(arguments: Sequence[str]) -> str:
    """The folder of the primary config: OTL's own, or that of --config-path."""
    asked = get_args_parser().parse_known_args(list(arguments))[0].config_path
    return str(Path(asked).absolute() if asked else conf_dir())


def check_line(arguments: Sequence[str]) -> None:
    """Check every job of a command line before a folder is made or the first job starts.

    Raises:
        SettingsError: lists every problem.
    """
    line, strangers = get_args_parser().parse_known_args(list(arguments))
    if strangers:
        raise SettingsError(report(list(explain_flags(strangers))))
    shows = line.help or line.hydra_help or line.cfg or line.info or line.shell_completion or line.experimental_rerun
    if shows:
        return
    folder, name = config_path(arguments), line.config_name or CONFIG_NAME
    where: dict[str, Any] = {"name": name, "extra": line.config_dir, "folder": folder}
    known = list(jobs(line.overrides, groups_in(line.config_dir, folder))) if line.multirun else [line.overrides]
    for overrides in known:
        settings, hydra_settings = composed(overrides, **where)
        plain: Any = OmegaConf.to_container(hydra_settings, resolve=False)
        require_all([*of_hydra(plain), *of_ranks(plain, task_of(settings), sweeps=line.multirun)])
        sweeper = str(plain["sweeper"].get("_target_"))
        problems = [*unswept(line.overrides, sweeper), *misread(overrides, settings), *check(settings)]
        listed = {problem.message for problem in problems}  # Hydra repeats the line in its own settings
        require_all([*problems, *(each for each in harmful(hydra_settings) if each.message not in listed)])
    if not known:  # Hydra writes the line and its own settings down before the sweeper knows the jobs
        same, swept = parted(line.overrides)
        settings, hydra_settings = composed(same, **where)
        rest: Any = OmegaConf.to_container(settings, resolve=False)
        require_all(harmful(hydra_settings, swept | rest))


def task_of(settings: DictConfig) -> str | None:
    """The `_target_` of the task; None where none is chosen."""
    task = settings._get_node("task")
    return task.get("_target_") if isinstance(task, DictConfig) and task else None


def composed(overrides: Sequence[str], **where: Any) -> tuple[DictConfig, DictConfig]:
    """The settings of a job, and Hydra's own."""
    settings = compose_settings(overrides, hydra=True, **where)
    with open_dict(settings):
        hydra_settings = settings.pop("hydra")
    return settings, hydra_settings


def harmful(hydra_settings: DictConfig, written: dict[str, Any] | None = None) -> list[Problem]:
    """What Hydra itself would call for these settings, before any task, and tokens that it would write down.

    Args:
        written: what else it would write.
    """
    plain: Any = OmegaConf.to_container(hydra_settings, resolve=False)
    return [*hydra_calls(plain), *secrets({"hydra": plain, **(written or {})})]


def refusal(error: BaseException) -> str | None:
    """The message of the SettingsError that an error is or was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SettingsError):
            return str(cause)
        cause = cause.__cause__
    return None


def unreached(error: OSError, arguments: Sequence[str]) -> str:
    """The message for a path that the system does not look at, with the setting of the line that gives it."""
    path = Path(str(error.filename))
    line = [word.lstrip("+").partition("=") for word in arguments]
    names = {Path(value).name: key for key, _, value in line if Path(value).name in {*path.parts, path.stem}}
    key = names.get(max(names, key=len, default=""), "settings")
    return f"{key}: {path}: {error.strerror}; give another path"


def explained(error: BaseException, arguments: Sequence[str]) -> str | None:
    """The message for an error that the person who typed the line can mend; None for any other."""
    in_job = any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, OSError) and error.errno in DISK and not in_job:
        return (
            f"the run's folder cannot be made: {error}; make room, mend the disk, or choose another folder "
            "(hydra.run.dir, of a sweep hydra.sweep.dir)"
        )
    if isinstance(error, OSError) and error.errno in UNREACHED and not in_job:
        return unreached(error, arguments)
    composing = isinstance(error, (*COMPOSING, yaml.YAMLError)) and not in_job
    if refusal(error) or not composing:
        return refusal(error)
    line = get_args_parser().parse_known_args(list(arguments))[0]
    name = line.config_name or CONFIG_NAME
    return report(explain(error, line.overrides, name=name, extra=line.config_dir, sweeps=line.multirun))
