"""Fill the cache ahead of a run, and look after it: show, verify, compact, prune."""

from __future__ import annotations

import datetime
import logging
import time
from pathlib import Path
from typing import Literal

from lightning.fabric import Fabric
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from otl.callbacks.progress import track
from otl.config import RunEnded
from otl.datamodules import upkeep, uses
from otl.datamodules.bucketed import report
from otl.datamodules.cache import Cache
from otl.formats.files import size
from otl.modules.base import DiffusionModule
from otl.quiet import undouble_lightning
from otl.tasks import classes, ranks
from otl.tasks.precision import allow_tf32, choose
from otl.tasks.run import build_data, build_module, build_skeleton, run_dir

log = logging.getLogger(__name__)

IDENTITY = 8  # digits shown of an encoder's identity


class DamageFound(RunEnded):
    """What is in the cache is not what was written."""


def cache(
    settings: DictConfig,
    *,
    action: Literal["fill", "show", "verify", "compact", "prune"] = "fill",
    delete: bool = False,
    days: float | None = None,
    folder: Path | None = None,
) -> None:
    """One action on the cache in `data.cache_dir`. All but `fill` need neither images nor a model.

    Args:
        action: fill encodes all that a run of these settings would; show says what is there; verify compares all
            checksums; compact merges small files; prune deletes what no dataset uses.
        delete: whether prune deletes, or only says what it would.
        days: after which prune does not count a dataset that no run has used; None: every dataset counts.
        folder: of the run; None: the one that Hydra made.

    Raises:
        DamageFound: verify has found damage.
    """
    if action == "fill":
        fill(settings, folder)
        return
    store, console = Cache(Path(settings.data.cache_dir).expanduser()), Console()
    if action == "show":
        show(store, console)
    elif action == "verify":
        verify(store)
    elif action == "compact":
        before, after = upkeep.compact(store, track)
        log.info(f"{store.folder}: {f'{before} files became {after}' if before else 'nothing to merge'}")
    else:
        prune(store, days=days, delete=delete)


def fill(settings: DictConfig, folder: Path | None = None) -> None:
    """Every rank encodes its share of what the cache lacks."""
    undouble_lightning()
    folder = run_dir() if folder is None else folder
    trainer = settings.trainer
    precision = choose(trainer.precision, accelerator=trainer.accelerator, devices=trainer.devices)
    allow_tf32(precision, accelerator=trainer.accelerator)
    classes.draw_missing(settings, autocast=precision.autocast)
    module = build_module(settings)
    module.run_dir, module.track, module.autocast_dtype = folder, track, precision.autocast
    data = build_data(settings, build_skeleton(settings))
    data.setup("fit")
    for problem in data.problems:
        log.warning(report(problem))
    fabric = Fabric(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.get("num_nodes") or 1,
        strategy="ddp" if ranks.count(trainer) > 1 else "auto",
    )
    with ranks.started(folder):
        fabric.launch()
        prompts = load_encoders(module, fabric)
        data.trainer = fabric  # type: ignore[assignment]  # filling asks for the rank and a barrier
        data.fill_cache(module, images=True, prompts=prompts, progress=track)
        fabric.barrier()
    if fabric.is_global_zero:
        show(Cache(Path(settings.data.cache_dir).expanduser()), Console())


def load_encoders(module: DiffusionModule, fabric: Fabric) -> bool:
    """On this rank's device; returns whether captions are cached: not where a text encoder trains."""
    module.load_encoders()
    prompts = not module.trains_text
    module.trained = nn.ModuleDict()  # nothing trains here, and the denoiser has no weights that could be moved
    for name in (module.image_encoder, *(module.text_encoders if prompts else ())):
        if name:  # else latents are made without weights
            module.part(name).to(fabric.device)
    module.to(fabric.device)
    return prompts


def show(store: Cache, console: Console) -> None:
    """What is in the cache, which datasets use it, and what pruning would free."""
    found = upkeep.contents(store)
    table = Table(
        "kind", "family", "encoder", "entries", "files", "size", title=f"{store.folder}", title_justify="left"
    )
    for each in found:
        kind, family, encoder = each.origin
        table.add_row(kind, family, encoder[:IDENTITY], f"{each.entries:,}", str(each.shards), size(each.nbytes))
    total = f"{sum(each.entries for each in found):,}", str(sum(each.shards for each in found))
    table.add_section()
    table.add_row("all", "", "", *total, size(sum(each.nbytes for each in found)))
    console.print(table)
    unused, small = upkeep.prune(store, days=None, really=False), sum(map(len, upkeep.mergeable(store)))
    lines = [f"used {day(use.last)}: {use.count:,} entries of {use.dataset}" for use in datasets(store)]
    lines.append(f"unused: {unused.entries:,} entries, {unused.files} files, {size(unused.nbytes)} (task.action=prune)")
    lines += [f"small: {small} files (task.action=compact)"] * bool(small)
    lines += [f"not read: {store.folder / name}: {reason}" for name, reason in store.unreadable.items()]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def datasets(store: Cache) -> list[uses.Use]:
    """The newest record of each, and those of runs that may be going on."""
    return uses.counting(uses.records(store.folder), now=time.time(), days=None)


def day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")


def verify(store: Cache) -> None:
    """Raises DamageFound: there is damage; every damaged entry and file is named."""
    lines = upkeep.verify(store, track)
    entries = sum(shard.count for shard in store.shards)
    if lines:
        raise DamageFound("\n".join([*lines, f"{store.folder}: {len(lines)} damaged; the next run makes them again"]))
    log.info(f"{store.folder}: {entries:,} entries are what was written")


def prune(store: Cache, *, days: float | None, delete: bool) -> None:
    removal = upkeep.prune(store, days=days, really=delete, progress=track)
    what = (
        f"{removal.entries:,} entries that no dataset uses, {removal.files} unfinished or broken files and "
        f"{removal.records} old records, {size(removal.nbytes)}"
    )
    said = f"deleted {what}" if delete else f"would delete {what}; task.delete=true does it"
    log.info(f"{store.folder}: {said}")
