"""What a run needs on the disks: counted from its plan, before it begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from otl.callbacks.backups import FOLDER
from otl.callbacks.export import megabytes
from otl.callbacks.sampling import FOLDER as PICTURES
from otl.callbacks.sheet import LARGEST
from otl.datamodules.shards import SUFFIX
from otl.formats.files import existing, size
from otl.formats.folder import DTYPES
from otl.modules.base import DiffusionModule
from otl.tasks import classes
from otl.tasks.folder import exported
from otl.tasks.memory import Encoded
from otl.types import Problem

ROW = 256  # bytes of a step in metrics.csv and among TensorBoard's events
EVENTS = "tensorboard"  # folder of the events


class Need(NamedTuple):
    """Room for one purpose."""

    key: str  # the setting that says where
    folder: Path
    bytes: int
    there: int  # bytes of it that may be there already
    what: str  # in words


def estimate(
    made: dict[str, Any], module: DiffusionModule, settings: DictConfig, encoded: Encoded | None = None
) -> dict[str, Any]:
    """Bytes of each kind of file, and how many of each there are at once.

    Args:
        made: the plan: weights, memory, resolution, captions, images_to_draw, pixels_cached and total_steps are read.
        encoded: what the cache holds of an image and of a caption; None: there is no cache.
    """
    trained = sum(row["trained"] for row in made["weights"])
    checkpoints, exports = settings.callbacks.get("checkpoint"), settings.callbacks.get("export")
    averaged = (settings.callbacks.get("ema") or {}).get("decay") is not None
    assert module.method is not None
    written = sum(row["parameters"] for row in made["weights"]) if module.method.whole_parts else trained
    found = {
        "checkpoint": 4 * trained * (1 + averaged) + made["memory"]["optimizer"],
        "checkpoints": checkpoints.keep + checkpoints.best + 1 if checkpoints else 0,  # one is being written
        "result": written * DTYPES[settings.output.dtype].itemsize,
        "results": 1 + made["total_steps"] // exports.every if exports and exports.every else 1,
        "drawing": drawing(settings, made["resolution"]),
        "drawings": drawings(settings.callbacks.get("sampling"), made["total_steps"]),
        "rows": ROW * made["total_steps"],
        "cache": cached(made, encoded) if encoded is not None else 0,
        "class_image": class_image(made["resolution"]),
        "class_images": made["images_to_draw"] * class_image(made["resolution"]),
    }
    pairs = (("checkpoint", "checkpoints"), ("result", "results"), ("drawing", "drawings"))
    run = sum(found[each] * found[count] for each, count in pairs) + found["rows"]
    return found | {"run": run, "total": run + found["cache"] + found["class_images"], "estimate": True}


def class_image(side: int) -> int:
    """Bytes of one at most: as if PNG did not pack it."""
    return 3 * side**2


def drawing(settings: DictConfig, side: int) -> int:
    """Bytes of all pictures that are drawn at once, and of their sheet, at most: as if PNG did not pack them.

    Args:
        side: of a picture whose size is not set, pixels.
    """
    sample, logger = settings.sample, settings.logger
    pictures = len(sample.prompts) * len(sample.seeds)
    copies = 2 if logger and "TensorBoard" in logger._target_ else 1
    return pictures * 3 * (copies * (sample.height or side) * (sample.width or side) + LARGEST**2)


def drawings(sampling: DictConfig | None, steps: int) -> int:
    """How often pictures are drawn: before the first step, on the way, and at the end."""
    if not sampling:
        return 0
    return sampling.first + (-(-steps // sampling.every) if sampling.every else 1)


def cached(made: dict[str, Any], encoded: Encoded) -> int:
    """Bytes of a cache that has nothing yet of this dataset."""
    return round(made["pixels_cached"] * encoded.pixel) + (made["captions"]["distinct"] or 0) * encoded.caption


def problems(needs: dict[str, Any], settings: DictConfig, folder: Path) -> list[Problem]:
    """Where there is no room; what the run and the cache have there already counts as room.

    Args:
        needs: what `estimate` gave.
        folder: of the run.
    """
    cache = of_cache(needs, Path(settings.data.cache_dir).expanduser())
    return lacking([of_run(needs, settings, folder), cache, *of_class_images(needs, settings)])


def of_run(needs: dict[str, Any], settings: DictConfig, folder: Path) -> Need:
    own = [*exported(settings, folder), *(folder / FOLDER).glob("*.ckpt"), folder / PICTURES, folder / EVENTS]
    there = round(sum(megabytes(path) for path in own if path.exists()) * 1e6)
    kinds = [
        f"{needs['checkpoints']} checkpoints of {size(needs['checkpoint'])}",
        f"{needs['results']} results of {size(needs['result'])}",
        f"{needs['drawings']} drawings of {size(needs['drawing'])}" if needs["drawing"] else "",
    ]
    what = " and ".join(filter(None, kinds))
    return Need("hydra.run.dir", folder, needs["run"], there, f"{what} (callbacks.checkpoint.keep lowers it)")


def of_cache(needs: dict[str, Any], folder: Path) -> Need:
    there = sum(shard.stat().st_size for shard in folder.glob(f"*{SUFFIX}"))
    what = f"{size(needs['cache'])} of encoded images and captions (data.cache=false keeps none)"
    return Need("data.cache_dir", folder, needs["cache"], there, what)


def of_class_images(needs: dict[str, Any], settings: DictConfig) -> Iterator[Need]:
    """For each concept those that are still to be drawn."""
    for source in classes.lacking(settings):
        assert source.folder is not None
        count, each = classes.missing(source), needs["class_image"]
        yield Need(source.key, source.folder, count * each, 0, f"{count} class images of {size(each)}")


def device(folder: Path) -> int:
    """A number of the disk that a folder lies on, or will."""
    return os.stat(existing(folder)).st_dev


def lacking(needs: list[Need], disk_of: Callable[[Path], int] = device) -> list[Problem]:
    """One problem for each disk that has less room than what is needed on it."""
    found, disks = [], dict[int, list[Need]]()
    for need in needs:
        if need.bytes:
            disks.setdefault(disk_of(need.folder), []).append(need)
    for together in disks.values():
        free = shutil.disk_usage(existing(together[0].folder)).free
        lacks = sum(max(0, need.bytes - need.there) for need in together)
        if lacks > free:
            message = (
                f"{together[0].folder} has {size(free)} free, and the run needs about {size(lacks)} there, for "
                f"{'; '.join(need.what for need in together)}: make room, or choose another folder "
                f"({', '.join(f'{need.key}={need.folder}' for need in together)})"
            )
            found.append(Problem(together[0].key, message))
    return found
