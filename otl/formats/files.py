"""Safetensors files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from otl.config import SettingsError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; on leaving without an error it is flushed to the disk and takes its place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and header fields to a safetensors file.

    Raises:
        ValueError: a tensor holds NaN or infinity, or a header field is no string.
    """
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise SettingsError(
            f"{path} was not written: {listed(broken)} would hold NaN or infinity. "
            "If output.dtype=fp16, bf16 and fp32 reach further"
        )
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f"{path} was not written: header fields must be strings, which {listed(wrong)} is not")
    with whole(path) as aside:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, aside, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header fields of a safetensors file.

    Raises:
        SettingsError: it is not there, or not a whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"{path}: not a whole safetensors file ({error})") from error


def tensors_hash(path: Path) -> str:
    """SHA-256 of a safetensors file's tensors, in hexadecimal: the same whatever the header says."""
    with path.open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(names: list[str], limit: int = 8) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
