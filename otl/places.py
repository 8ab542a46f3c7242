"""The folders and files that settings name, and that have to be there."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from otl.config import ARCHIVES, MANIFESTS, TABLES, Problem, SettingsError, as_problem, assets_dir
from otl.formats.objects import parsed
from otl.signatures import Unknown
from otl.urls import hub_hint, is_place, is_url, looks_like_path, unreadable
from otl.wording import counted, flat, meant, show

DATA_TASKS = {f"otl.tasks.{name}.{name}" for name in ("train", "plan", "cache", "caption", "mask", "rank")}
LOADING_TASKS = {f"otl.tasks.{name}.{name}" for name in ("train", "cache", "rank", "caption", "mask")}
CACHE = "otl.tasks.cache.cache"
NAMED = {  # what names a file, a folder or a place on the hub: nothing is none of these
    "model.checkpoint": "a hub name, a folder or a .safetensors file",
    "model.config": "a folder of otl/assets/configs, or null",
    "model.effnet": "a file, a folder or a hub name",
    "model.decoder": "a hub name or a folder, or null",
    "model.text_encoder": "a hub name or a folder",
    "method.from_file": "a file, or null",
    "method.targets": "a preset, or a list of patterns",
    "captioner.checkpoint": "a hub name or a folder",
    "masker.checkpoint": "a file, a folder or a hub name",
    "data.cache_dir": "a folder",
    "output.name": "a file name without suffix",
    "resume": "a checkpoint, auto or null",
}
CAPTION, MASK, REPEAT = (f"otl.tasks.{name}.{name}" for name in ("caption", "mask", "repeat"))
NEEDED: dict[str, type] = dict.fromkeys(("settings", "versions", "machine", "images", "masks"), dict) | {"folder": str}
"""Of a manifest, to repeat its run."""
LONGEST_NAME = 200  # bytes of a result's; a file's may have 255, and some get a step's number and more
SOCKET = len("/pymp-12345678/listener-12345678")  # what multiprocessing calls one
LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes; torch's loader would wait for ever beyond it


def of_places(settings: dict[str, Any]) -> Iterator[Problem]:
    """Folders and files that are not there, or are of another kind."""
    data = settings.get("data", {})
    concepts = {name: each for name, each in data.get("concepts", {}).items() if each.get("enabled", True)}
    places = {
        f"data.concepts.{name}.path": concept.get("path") for name, concept in concepts.items() if not _drawn(concept)
    }
    places["data.path"] = data.get("path")
    task = (settings.get("task") or {}).get("_target_")
    if task == CACHE:
        yield from _check_cache(settings["task"], data)
    needs_images = task in DATA_TASKS and not (task == CACHE and settings["task"].get("action") != "fill")
    if needs_images and not data.get("path") and not data.get("concepts"):
        ways = "data.path=photos/ or data.concepts.NAME.path=photos/"
        yield Problem(
            "data.path",
            f"{show(data.get('path')) or 'nothing'} is given, but this task reads images: give their folder, {ways}",
        )
    for key, path in places.items():
        if isinstance(path, str) and path:
            yield from _check_source(key, path)
        elif path == "" and key != "data.path":
            yield Problem(key, "nothing is given: give a folder of images, or a file that holds or lists some")
    for key, group in {"data": data, **{f"data.concepts.{name}": each for name, each in concepts.items()}}.items():
        if isinstance(group.get("mask_folder"), str) and task != MASK:  # which makes it
            yield from _check_folder(f"{key}.mask_folder", group["mask_folder"])
    yield from _check_temporary(data.get("workers"))
    yield from _check_canvases(settings.get("sample") or {})
    yield from _check_named(settings)
    yield from _check_weights(settings, task)
    yield from _check_config(settings.get("model") or {})
    yield from _check_name((settings.get("output") or {}).get("name"))
    yield from _check_resume(settings.get("resume"))
    if task in DATA_TASKS and data.get("cache") is not False:
        yield from _check_cache_folder(data.get("cache_dir"))
    yield from _check_manifest(settings.get("manifest"), repeats=task == REPEAT)


def _check_temporary(workers: Any) -> Iterator[Problem]:
    """The folder for temporary files, through which the loader's processes pass what they make."""
    excess = len(os.fsencode(tempfile.gettempdir())) + SOCKET - LONGEST_SOCKET
    if isinstance(workers, int) and workers > 0 and excess > 0:
        message = (
            f"{workers} processes could not hand over what they load: their sockets lie in the folder for temporary "
            f"files, {tempfile.gettempdir()}, whose path is {counted(excess, 'byte')} too long for that; set TMPDIR to "
            "another one, or data.workers=0"
        )
        yield Problem("data.workers", message)


def _check_name(name: Any) -> Iterator[Problem]:
    """Of the results, which stay in the run's folder."""
    if not isinstance(name, str) or not name:
        return
    if Path(name).name != name or name.startswith("."):
        yield Problem("output.name", f"{name!r} is no plain file name: results stay in the run's folder, hydra.run.dir")
    elif len(os.fsencode(name)) > LONGEST_NAME:
        yield Problem("output.name", f"{name} is too long for a file: give at most {LONGEST_NAME} bytes")


def _check_resume(resume: Any) -> Iterator[Problem]:
    """The checkpoint to go on from, or the folder that has some."""
    if not isinstance(resume, str) or resume in ("", "auto"):
        return
    path = Path(resume).expanduser()
    if not path.exists():
        yield Problem("resume", f"{resume} does not exist: give a checkpoint, auto (the run's newest) or null")
    elif path.is_dir() and not any(path.glob("*.ckpt")):
        close = any(path.glob("checkpoints/*.ckpt"))
        hint = f"; did you mean {path / 'checkpoints'}?" if close else ": give a checkpoint, or the folder of some"
        yield Problem("resume", f"{resume} has no checkpoint in it{hint}")


def _check_cache_folder(folder: Any) -> Iterator[Problem]:
    """Where the cache is to be made."""
    if not isinstance(folder, str) or not folder:
        return
    path = Path(folder).expanduser().absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    ways = "choose another folder, or set data.cache=false"
    if not there.is_dir():
        yield Problem("data.cache_dir", f"{folder}: {there} is a file, and no folder can be made of it; {ways}")
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Problem("data.cache_dir", f"{folder}: {there} cannot be written by this user; {ways}")


def _check_canvases(sample: dict[str, Any]) -> Iterator[Problem]:
    """The pictures that are painted in."""
    for key in ("image", "mask"):
        value = sample.get(key)
        for path in value if isinstance(value, list) else [value]:
            if path is None or path is Unknown:
                continue
            if not isinstance(path, str):
                yield Problem(f"sample.{key}", f"{show(path)} is not accepted: give a path, or a list of paths")
            elif not Path(path).expanduser().is_file():
                yield Problem(f"sample.{key}", f"{path}: there is no such file")
            elif not _is_picture(Path(path).expanduser()):
                yield Problem(f"sample.{key}", f"{path}: is no picture that can be read; give another one")


def _is_picture(path: Path) -> bool:
    """Whether a file's header is one of an image."""
    from PIL import Image  # only here: few runs paint in pictures

    try:
        with Image.open(path):
            return True
    except OSError:
        return False


def _check_named(settings: dict[str, Any]) -> Iterator[Problem]:
    """Names that are empty, which would mean the folder that the command was typed in, or everything."""
    given = flat(settings)
    for key, accepted in NAMED.items():
        if given.get(key) == "":
            yield Problem(key, f"nothing is given: give {accepted}")


def _check_weights(settings: dict[str, Any], task: Any) -> Iterator[Problem]:
    """Weights that are to lie on a disk, and do not."""
    model, tool = settings.get("model") or {}, "captioner" if task == CAPTION else "masker"
    asked = {f"{tool}.checkpoint": (settings.get(tool) or {}).get("checkpoint")}
    if str(model.get("_target_")).startswith("otl.") and task not in (CAPTION, MASK):
        asked = {f"model.{name}": model.get(name) for name in ("checkpoint", "decoder", "effnet", "text_encoder")}
    loads = task in LOADING_TASKS and not (task == CACHE and settings["task"].get("action") != "fill")
    for key, source in asked.items() if loads else ():
        if not isinstance(source, str) or not source:
            continue
        local = looks_like_path(source) if key == "model.checkpoint" else is_place(source) or source.endswith(".onnx")
        path = Path(source).expanduser()
        if local and not path.exists():
            there = [each.name for each in path.absolute().parent.glob("*")]
            message = f"{source} does not exist (looked for {path.absolute()}){meant(path.name, there)}"
            yield Problem(key, f"{message}; give {NAMED[key]}" if not meant(path.name, there) else message)
        elif (
            key == "model.checkpoint" and not local and os.environ.get("HF_HUB_OFFLINE") and (kept := _not_kept(source))
        ):
            message = f"{source} is not in the hub's cache ({kept}), and HF_HUB_OFFLINE keeps OTL from the hub"
            yield Problem(key, f"{message}; leave that out once, or give a folder or a .safetensors file")


def _not_kept(name: str) -> str:
    """Where the hub's cache is, which has not that pipeline; empty: it has, or the hub may be asked."""
    from huggingface_hub import constants, try_to_load_from_cache  # only here: a tenth of a second

    missing = constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, "model_index.json"), str)
    return constants.HF_HUB_CACHE if missing else ""


def _check_config(model: dict[str, Any]) -> Iterator[Problem]:
    """The description of a checkpoint's networks, which ships with OTL."""
    config, own = model.get("config"), str(model.get("_target_")).startswith("otl.")
    folder = assets_dir() / "configs"
    if own and isinstance(config, str) and config and not (folder / config).is_dir():
        there = sorted(path.name for path in folder.iterdir())
        yield Problem("model.config", f"{config} is none of {', '.join(there)}{meant(config, there)}")


def _drawn(concept: dict[str, Any]) -> bool:
    """Whether a concept's folder is made when its class images are drawn."""
    images, path = concept.get("generate"), concept.get("path")
    return isinstance(images, int) and images > 0 and isinstance(path, str) and not Path(path).expanduser().exists()


def _check_cache(task: dict[str, Any], data: dict[str, Any]) -> Iterator[Problem]:
    """What would have no effect on the cache."""
    for name, idle in (("delete", False), ("days", None)):
        if task.get(name, idle) != idle and task.get("action") != "prune":
            yield Problem(f"task.{name}", f"{show(task[name])} would have no effect: it needs task.action=prune")
    if task.get("action") == "fill" and data.get("cache") is False:
        yield Problem("data.cache", "false, so that no run of these settings would read what task=cache makes")


def _check_manifest(manifest: Any, *, repeats: bool) -> Iterator[Problem]:
    """The manifest of the run to repeat."""
    if repeats and not manifest:
        yield Problem("manifest", "must be given: task=repeat needs that of a run, manifest=RUN/manifest.json")
    elif manifest and not repeats:
        yield Problem("manifest", f"{show(manifest)} would have no effect: it needs task=repeat")
    elif isinstance(manifest, str) and not Path(manifest).expanduser().is_file():
        yield Problem("manifest", f"{manifest} does not exist: give the manifest.json of a run")
    elif isinstance(manifest, str):
        try:
            recorded(Path(manifest).expanduser())
        except SettingsError as error:
            yield as_problem(error)


def recorded(manifest: Path) -> dict[str, Any]:
    """What is written of a run.

    Raises:
        SettingsError: nothing is, or by an earlier version.
    """
    try:
        record = parsed(manifest.read_bytes(), f"manifest={manifest}: cannot be read: it")
    except OSError as error:
        message = f"manifest={manifest}: cannot be read ({error}); give the manifest.json of a run"
        raise SettingsError(message) from error
    missing = [name for name, kind in NEEDED.items() if not isinstance(record.get(name), kind)]
    if missing:
        raise SettingsError(
            f"manifest={manifest}: no manifest of a run: {', '.join(missing)} are not in it; give the manifest.json of "
            "a run"
        )
    return record


def _check_source(key: str, text: str) -> list[Problem]:
    """A folder of images, a file that lists or holds some, or the URL of one."""
    if is_url(text):
        reason = unreadable(text)
        return [Problem(key, f"{text}: {reason}")] if reason else []
    if re.search(r"[*?]", text):
        return []
    accepted = (*ARCHIVES, *TABLES, *MANIFESTS)
    path = Path(text).expanduser()
    if not path.is_file():
        return [replace(problem, message=problem.message + hub_hint(text)) for problem in _check_folder(key, text)]
    if path.suffix.lower() in accepted:
        return []
    return [Problem(key, f"{text} is a file: give the folder it is in, or a file of images: {', '.join(accepted)}")]


def _check_folder(key: str, text: str) -> list[Problem]:
    path = Path(text).expanduser()
    if path.is_dir():
        return []
    if path.exists():
        return [Problem(key, f"{text} is a file: give the folder it is in")]
    there = [entry.name for entry in path.absolute().parent.glob("*/")] if path.absolute().parent.is_dir() else []
    slash = "; here / stands between folders" if "\\" in text and os.sep == "/" else meant(path.name, there)
    return [Problem(key, f"{text} does not exist (looked for {path.absolute()}){slash}")]
