"""manifest.json: what a run was, so that it can be repeated. Written by the first rank."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from otl.datamodules.bucketed import BucketedDataModule
from otl.datamodules.files import content_hash
from otl.datamodules.index import Index
from otl.formats.files import tensors_hash, whole
from otl.modules.base import DiffusionModule
from otl.modules.loading import identity
from otl.tasks.run import plain
from otl.types import File
from otl.wording import flat

NAME = "manifest.json"
PACKAGES = (
    "otl",
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "peft",
    "hydra-core",
    "safetensors",
    "bitsandbytes",
)


@rank_zero_only
def start(settings: DictConfig, contents: dict[str, dict[str, str]], folder: Path) -> dict[str, Any]:
    """Write what is known before the first step, and return it.

    Args:
        contents: what `contents_of` gave.
    """
    record = {
        "started": now(),
        "outcome": "running",
        "folder": str(Path.cwd()),  # that relative paths of the settings start from
        "run": str(folder.absolute()),  # where loggers write, too
        "seed": settings.seed,
        "settings": plain(settings),
        "versions": versions(plain(settings)),
        "machine": machine(),
        **contents,
    }
    write(record, folder)
    return record


def add_weights(record: dict[str, Any], module: DiffusionModule, folder: Path) -> None:
    """Of a model that came from the hub when it was loaded: only now it is known which it was."""
    record["weights"] = identity(module)
    write(record, folder)


@rank_zero_only
def finish(record: dict[str, Any], folder: Path, *, outcome: str, step: int) -> None:
    """Add what came out: every exported file with its hash."""
    name = record["settings"]["output"]["name"]
    files = [folder / f"{name}.safetensors", *sorted((folder / name).rglob("*"))]
    files = [path for path in files if path.is_file()]
    ended = {"finished": now(), "outcome": outcome, "step": step, "files": hashes(files)}
    digests = {str(path.relative_to(folder)): tensors_hash(path) for path in files if path.suffix == ".safetensors"}
    write(record | ended | ({"tensors": digests} if outcome == "finished" else {}), folder)


def contents_of(data: BucketedDataModule, module: DiffusionModule) -> dict[str, dict[str, str]]:
    """The hashes of what is trained on and of what is trained, by "images", "masks", "captions" and "weights"."""
    known = Index(Path(data.data.cache_dir).expanduser(), "weights") if data.data.cache else None
    weights = identity(module, known)
    return {"images": images(data), "masks": masks(data), "captions": captions(data), "weights": weights}


def images(data: BucketedDataModule) -> dict[str, str]:
    """File -> hash, of all images to train on."""
    return hashes([sample.path for sample in data.samples])


def masks(data: BucketedDataModule) -> dict[str, str]:
    """File -> hash, of their masks."""
    return hashes([sample.mask for sample in data.samples if sample.mask is not None])


def captions(data: BucketedDataModule) -> dict[str, str]:
    """File -> hash of all captions that the image may have."""
    texts: dict[str, list[str]] = {}
    for sample in data.samples:
        texts.setdefault(str(sample.path), []).extend(sample.captions)
    return {file: hashlib.blake2b(repr(each).encode(), digest_size=8).hexdigest() for file, each in texts.items()}


def hashes(files: Sequence[File]) -> dict[str, str]:
    """File -> hash of its bytes."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(map(str, files), pool.map(content_hash, files), strict=True))


def versions(settings: dict[str, Any]) -> dict[str, str]:
    """Package -> version, of what decides the result: what OTL is made of, and what the settings call besides."""
    found = {"python": platform.python_version()}
    for name in dict.fromkeys((*PACKAGES, *called(settings))):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a bare clone
            found[name] = "not installed"
    return found


def called(settings: dict[str, Any]) -> list[str]:
    """The installed distributions whose code the settings name by `_target_`, as of plugins, but for PACKAGES."""
    targets = [value for key, value in flat(settings).items() if key.endswith("_target_")]
    packages = {str(target).partition(".")[0] for target in targets} - {*PACKAGES}
    if not packages:
        return []
    installed = importlib.metadata.packages_distributions()  # goes through the lists of all installed files
    return sorted({name for package in packages for name in installed.get(package, [])})


def machine() -> dict[str, str]:
    """What else decides the last bits of a result: sums depend on the number of threads and on the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "threads": str(torch.get_num_threads())}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(record: dict[str, Any], folder: Path) -> None:
    with whole(folder / NAME) as aside:
        aside.write_text(json.dumps(record, indent=2, default=str))
