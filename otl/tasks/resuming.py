"""Going on from a checkpoint: which one, and whether the run is still the same."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import traceback
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from otl.callbacks.backups import FOLDER, is_whole, newest
from otl.config import SettingsError
from otl.datamodules.bucketed import BucketedDataModule
from otl.formats.files import bytes_of, listed, unpickled
from otl.modules.base import DiffusionModule
from otl.modules.folders import said
from otl.types import Sample
from otl.wording import flat, show

log = logging.getLogger(__name__)

# What leaves the training as it is; `*` stands for anything. Folders of images are compared by what is in them, the
# length of the run by what follows from it, and ranks and accumulation by the batches of a step.
FREE = """
resume allow_changes manifest experiment task.* output.* sample.* logger logger.*
data.path data.concepts.*.path data.mask_folder data.concepts.*.mask_folder
data.workers data.cache_dir data.encode_batch_size
trainer.max_steps trainer.max_epochs trainer.devices trainer.num_nodes trainer.accumulate_grad_batches
trainer.max_time trainer.val_check_interval trainer.check_val_every_n_epoch trainer.limit_val_batches trainer.precision
callbacks.checkpoint callbacks.checkpoint.* callbacks.sampling callbacks.sampling.* callbacks.export callbacks.export.*
callbacks.metrics callbacks.metrics.* callbacks.progress callbacks.progress.* callbacks.guard callbacks.guard.*
""".split()
FREE_NAME = re.compile("|".join(re.escape(pattern).replace(r"\*", ".+") for pattern in FREE))
KINDS: dict[str, type] = {  # of what a checkpoint says of its run, and of what Lightning and the callbacks put back
    "settings": dict,
    "precision": str,
    "dataset": list,
    "total_steps": int,
    "world_size": int,
    "global_step": int,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "randomness": list,
}
PUT_BACK = ("lightning.pytorch.trainer.connectors.checkpoint_connector", "otl.callbacks.randomness")  # by `restore...`
OWN_NAMES = {"path", "mask", "bytes"}  # of a sample: where its content lies

Dataset = list[list[str]]
"""Name and digest of every image, in the order of the samples."""


def find(asked: str | None, folder: Path) -> Path | None:
    """The checkpoint that `resume` means.

    Raises:
        SettingsError: there is none, or it is damaged.
    """
    if asked is None:
        return None
    if asked == "auto":
        return _newest_of_run(folder / FOLDER)
    path = Path(asked).expanduser()
    path = (newest(path) or path) if path.is_dir() else path
    if not path.is_file():
        raise SettingsError(f"resume={asked}: no such checkpoint; give a .ckpt file, a checkpoints/ folder or auto")
    if not is_whole(path):
        before = newest(path.parent)
        raise SettingsError(
            f"resume={asked}: damaged; " + (f"{before} is whole" if before else "there is no whole one beside it")
        )
    return path


def _newest_of_run(folder: Path) -> Path | None:
    found = newest(folder)
    if found is not None:
        log.info(f"resume=auto: from {found}")
    elif damaged := [path.name for path in folder.glob("*.ckpt")]:
        raise SettingsError(
            f"resume=auto: no whole checkpoint in {folder}, though there are {listed(damaged)}: start anew in another "
            "hydra.run.dir, or with resume=null output.overwrite=true"
        )
    else:
        log.info(f"resume=auto: no checkpoint in {folder}, starting anew")
    return found


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; tensors stay on the disk.

    Raises:
        SettingsError: it holds anything but tensors and plain values, and so could run code; a tensor would be larger
            in memory than it is in the file; or it is not OTL's.
    """
    try:
        content = unpickled(path, mmap=True)
    except SettingsError as error:
        raise SettingsError(f"resume={error}; use a checkpoint that OTL wrote") from error
    held = content if isinstance(content, dict) else {}
    if wrong := wrong_in(held):
        raise SettingsError(
            f"resume={path}: not a checkpoint of a run of OTL: {listed(wrong)} is not in it, or not what it should be"
        )
    if not all(map(_lies_in_the_file, tree_leaves(held))):
        raise SettingsError(
            f"resume={path}: a tensor of it is larger than what it has in the file; use a checkpoint that OTL wrote"
        )
    return held


def wrong_in(held: dict[str, Any]) -> list[str]:
    """The names of what a checkpoint lacks, or has of another kind."""
    wrong = [name for name, kind in KINDS.items() if not isinstance(held.get(name), kind)]
    if wrong:
        return wrong
    trainer = held["settings"].get("trainer")
    sound = {
        "settings": isinstance(trainer, dict) and isinstance(trainer.get("accumulate_grad_batches"), int),
        "dataset": all(isinstance(row, list) and list(map(type, row)) == [str, str] for row in held["dataset"]),
        "global_step": held["global_step"] >= 0,
        "world_size": held["world_size"] >= 1,
        "randomness": held["randomness"] and all(isinstance(of_rank, dict) for of_rank in held["randomness"]),
    }
    return [name for name, good in sound.items() if not good]


@contextlib.contextmanager
def put_back(path: Path | None) -> Iterator[None]:
    """A run in here may fail because what its checkpoint holds cannot be put back.

    Args:
        path: of the checkpoint; None: there is none.

    Raises:
        SettingsError: that is why it failed.
    """
    try:
        yield
    except Exception as error:  # whatever an optimizer, a scheduler or a generator makes of it
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        restores = any(
            frame.f_globals.get("__name__") in PUT_BACK and frame.f_code.co_name.strip("_").startswith("restore")
            for frame in frames
        )
        if path is None or isinstance(error, SettingsError) or not restores:
            raise
        raise SettingsError(
            f"resume={path}: what it holds cannot be put back ({said(error)}): use a checkpoint that OTL wrote, of "
            "the same model, method and optimizer"
        ) from error


def _lies_in_the_file(value: Any) -> bool:
    """Not so a tensor that says one number again and again, and would fill the memory when it is copied."""
    if not isinstance(value, Tensor):
        return True
    return value.layout is torch.strided and bytes_of([value]) <= value.untyped_storage().nbytes()


def require_same(earlier: dict[str, Any], module: DiffusionModule, *, ranks: int, allowed: bool) -> None:
    """The run of the checkpoint is the run of the settings, or its changes are wanted.

    Args:
        earlier: what `read` gave.
        ranks: processes of this run.
        allowed: whether changes are.

    Raises:
        SettingsError: lists what would make the result another one.
    """
    changes = list(differences(earlier, module, ranks=ranks))
    if changes and not allowed:
        raise SettingsError(
            "\n  ".join(["resume: not everything is as it was, and the result would be another:", *changes])
            + "\nput it back as it was, start anew in another hydra.run.dir, or go on all the same with "
            "allow_changes=true"
        )
    for change in changes:
        log.warning(f"other than before step {earlier['global_step']}: {change}")


def differences(earlier: dict[str, Any], module: DiffusionModule, *, ranks: int) -> Iterator[str]:
    """A line for each thing by which the result would not be that of an unbroken run."""
    yield from other_settings(earlier["settings"], module.settings)
    if earlier["precision"] != module.precision_name:
        yield f"trainer.precision: {earlier['precision']} -> {module.precision_name}"
    yield from _batches(earlier, module, ranks)
    yield from _length(earlier, module)
    yield from images(earlier["dataset"], module.dataset)


def other_settings(earlier: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """A line for each setting that would make the training another one."""
    then, now = flat(earlier), flat(settings)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key) and not FREE_NAME.fullmatch(key):
            yield f"{key}: {show(then.get(key))} -> {show(now.get(key))}"


def _batches(earlier: dict[str, Any], module: DiffusionModule, ranks: int) -> Iterator[str]:
    """How many batches an optimizer step takes, on whichever ranks."""
    trainers = earlier["settings"]["trainer"], module.settings["trainer"]
    then, now = (n * t["accumulate_grad_batches"] for n, t in zip((earlier["world_size"], ranks), trainers))
    if then != now:
        yield (
            f"batches of an optimizer step: {then} -> {now}, by trainer.accumulate_grad_batches times the number of "
            "processes (trainer.devices)"
        )


def _length(earlier: dict[str, Any], module: DiffusionModule) -> Iterator[str]:
    """A longer run is no other one, unless its beginning would have been another."""
    then, now, step = earlier["total_steps"], module.total_steps, earlier["global_step"]
    assert module.lr_schedule is not None
    rates = [[module.lr_schedule(done, total) for done in range(min(step, now) + 1)] for total in (then, now)]
    stops = {key: value for key, value in flat(module.settings).items() if key.endswith(".stop_after")}
    shares = [key for key, value in stops.items() if isinstance(value, float) and value < 1]
    if then != now and (rates[0] != rates[1] or shares):
        what = "the learning rate so far" if rates[0] != rates[1] else listed(shares)
        yield f"trainer.max_steps: {then} -> {now} steps, which {what} depends on"


def dataset(data: BucketedDataModule, contents: dict[str, dict[str, str]]) -> Dataset:
    """What the run trains on, to be compared when it goes on.

    Args:
        contents: at least "images" and "masks" -> file -> hash of its bytes.
    """
    return [[sample.name, _digest(sample, contents["images"], contents["masks"])] for sample in data.samples]


def _digest(sample: Sample, images: dict[str, str], masks: dict[str, str]) -> str:
    own = {one.name: getattr(sample, one.name) for one in fields(sample) if one.name not in OWN_NAMES}
    mask = None if sample.mask is None else masks[str(sample.mask)]
    return hashlib.blake2b(repr((images[str(sample.path)], mask, own)).encode(), digest_size=8).hexdigest()


def images(then: Dataset, now: Dataset) -> Iterator[str]:
    """What has become of the images; nothing where content, captions and order are the same, wherever they lie."""
    before, after = ({digest for _, digest in each} for each in (then, now))
    if [digest for _, digest in then] == [digest for _, digest in now]:
        return
    gone = [name for name, digest in then if digest not in after]
    new = [name for name, digest in now if digest not in before]
    changed = [name for name in gone if name in new]
    kinds = {
        "are changed, or their captions, masks or concept": changed,
        "are new": [name for name in new if name not in changed],
        "are gone": [name for name in gone if name not in changed],
    }
    for what, names in kinds.items():
        if names:
            yield f"data: {len(names)} images {what}: {listed(names)}"
    if not gone and not new:
        yield "data: the images come in another order or number"
