"""The same run again, from its manifest; and whether the same came out."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from otl.check import require
from otl.config import Settings, SettingsError
from otl.formats.files import listed
from otl.places import recorded
from otl.tasks import manifest
from otl.tasks.run import build_data, build_skeleton, plain, run_dir
from otl.tasks.train import train
from otl.wording import flat

log = logging.getLogger(__name__)

OF_THIS_LINE = {"task", "manifest", "allow_changes"}  # settings that are the repetition's own
INTERPOLATION = re.compile(r"(\\*)\$\{")


def repeat(settings: DictConfig) -> None:
    """Train as `manifest` says, into a folder of its own, and compare.

    Args:
        settings: `manifest` and `allow_changes` are read, and what else the command line sets is changed.

    Raises:
        SettingsError: it is no manifest of a run; or data, versions or settings are not as they were then.
    """
    folder, line = run_dir(), list(HydraConfig.get().overrides.task)
    record = recorded(Path(settings.manifest).expanduser())
    record["settings"] = own(record["settings"], record.get("run"), folder)
    with contextlib.chdir(started_in(record)):
        repeated = settings_of(record, changes(line))
        require(repeated)
        differing = list(differences(record, repeated))
        if differing and not settings.allow_changes:
            raise SettingsError(
                "\n  ".join([f"{settings.manifest}: not everything is as it was then:", *differing])
                + "\nput it back as it was, or go on all the same with allow_changes=true"
            )
        for difference in differing:
            log.warning(f"other than then: {difference}")
        train(repeated, folder)
    log.info(comparison(record, json.loads((folder / "manifest.json").read_text(encoding="utf-8"))))


def own(settings: dict[str, Any], run: str | None, folder: Path) -> dict[str, Any]:
    """The settings of a run for a run elsewhere: its loggers write into the new folder, and not into the old one.

    Args:
        run: folder of the run that the settings are of; None: not known.
    """
    loggers = settings.get("logger")
    if run is None or not isinstance(loggers, dict):
        return settings
    moved = {name: str(folder.absolute()) if value == run else value for name, value in loggers.items()}
    return settings | {"logger": moved}


def started_in(record: dict[str, Any]) -> Path:
    """The folder that relative paths of the settings start from: as it was, or this one where that is not here."""
    folder = Path(record["folder"])
    return folder if folder.is_dir() else Path.cwd()


def changes(line: list[str]) -> dict[str, Any]:
    """What a command line changes besides: name -> value.

    Args:
        line: overrides as Hydra lists them.

    Raises:
        SettingsError: a group is chosen anew.
    """
    found = {}
    for override in OverridesParser.create().parse_overrides(line):
        key = override.key_or_group
        if key in OF_THIS_LINE:
            continue
        if key in Settings.__dataclass_fields__ and Settings.__dataclass_fields__[key].type == "Any":
            raise SettingsError(
                f"{key}={override.get_value_element_as_str()}: the manifest says which {key} it was; to use another, "
                "start a run of its own"
            )
        found[key] = override.value()
    return found


def settings_of(record: dict[str, Any], changed: dict[str, Any]) -> DictConfig:
    """The settings of the run, typed; from the start, also where it was resumed.

    Raises:
        SettingsError: this version of OTL has other settings.
    """
    try:
        settings: Any = OmegaConf.merge(OmegaConf.structured(Settings), literal(record["settings"]))
        for key, value in {"resume": None, **changed}.items():
            OmegaConf.update(settings, key, value)
    except Exception as error:
        raise SettingsError(f"the manifest's settings do not fit this version of OTL: {error}") from error
    return settings


def literal(node: Any) -> Any:
    """Settings that were resolved already, so that what looks like an interpolation in a text is none."""
    if isinstance(node, dict):
        return {name: literal(value) for name, value in node.items()}
    if isinstance(node, list):
        return [literal(value) for value in node]
    return INTERPOLATION.sub(r"\1\1\\${", node) if isinstance(node, str) else node


def differences(record: dict[str, Any], settings: DictConfig) -> Iterator[str]:
    """What is not as it was: settings, versions, machine, weights, images, masks and captions.

    Earlier manifests say nothing of captions and weights, and no manifest of weights that were not on this machine yet.
    """
    then, now = flat(record["settings"]), flat(plain(settings))
    yield from compared("setting", then | {"resume": None}, now)
    if not Path(record["folder"]).is_dir():
        yield f"folder that relative paths start from is {Path.cwd()}, was {record['folder']}, which is not here"
    yield from compared("version of", record["versions"], manifest.versions(plain(settings)))
    yield from compared("machine:", record["machine"], manifest.machine())
    skeleton = build_skeleton(settings)
    data = build_data(settings, skeleton)
    data.setup("fit")
    found = manifest.contents_of(data, skeleton)
    yield from compared_files("image", record["images"], found["images"])
    yield from compared_files("mask", record["masks"], found["masks"])
    yield from compared_files("caption of image", record.get("captions", found["captions"]), found["captions"])
    if record.get("weights") and found["weights"]:
        yield from compared("weights of the model,", record["weights"], found["weights"])


def compared_files(what: str, then: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """The same of files by their hashes; one line where all have moved, and are what they were."""
    named = [[(Path(path).name, digest) for path, digest in each.items()] for each in (then, now)]
    if then.keys() != now.keys() and named[0] == named[1]:
        yield f"{what}: all {len(now)} lie elsewhere than then, with the same names and contents"
    else:
        yield from compared(what, then, now)


def compared(what: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A line for each name whose value is not the same."""
    for name in sorted(then.keys() | now.keys()):
        if name not in then:
            yield f"{what} {name} is new"
        elif name not in now:
            if then[name] is not None:
                yield f"{what} {name} is gone"
        elif then[name] != now[name]:
            yield f"{what} {name} is {now[name]}, was {then[name]}"


def comparison(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Whether the tensors of every file that came out are the same, in words."""
    if "tensors" not in then:
        return f"nothing to compare: the run of the manifest was {then.get('outcome', 'never finished')}"
    other = [name for name, digest in then["tensors"].items() if now["tensors"].get(name) != digest]
    if other:
        return f"not the same as then: the tensors of {listed(other)} differ"
    return f"bit for bit the same as then: the tensors of {listed(list(then['tensors']))}"
