"""Where the checkpoints of the tools come from: a local file or folder, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from otl.config import SettingsError
from otl.modules.loading import looks_like_path, nearest, quiet


def located(key: str, checkpoint: str) -> Path | None:
    """The local file or folder that is meant; None: it is a name on the hub.

    Args:
        key: the setting, for messages.

    Raises:
        SettingsError: it is a path, and nothing is there.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    if looks_like_path(checkpoint):
        raise SettingsError(f"{key}={checkpoint}: there is no such file or folder{nearest(path)}")
    return None


@contextmanager
def explained(key: str, checkpoint: str) -> Iterator[None]:
    """What goes wrong inside is said in terms of the setting."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        where = "cannot be loaded" if Path(checkpoint).expanduser().exists() else "is not here, nor given by the hub"
        cause = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise SettingsError(f"{key}={checkpoint}: {where} ({type(error).__name__}: {cause})") from error


def file_of(key: str, checkpoint: str, name: str) -> Path:
    """One file of a checkpoint.

    Args:
        key: the setting, for messages.
        checkpoint: hub name, local folder, or a file in it.
        name: of the file, in the folder or on the hub.

    Raises:
        SettingsError: it is not there.
    """
    path = located(key, checkpoint)
    if path is None:
        from huggingface_hub import hf_hub_download

        with explained(key, checkpoint):
            return Path(hf_hub_download(checkpoint, name))
    if path.is_file() and path.suffix == Path(name).suffix:
        return path
    path = path / name if path.is_dir() else path.with_name(name)
    if not path.is_file():
        raise SettingsError(f"{key}={checkpoint}: there is no {name} in {path.parent}")
    return path


def pretrained(key: str, checkpoint: str, kind: Any, *, dtype: torch.dtype) -> Any:
    """A network of transformers with its weights on the CPU, frozen.

    Args:
        key: the setting, for messages.
        kind: its class.

    Raises:
        SettingsError: it cannot be loaded, or the checkpoint lacks some of its weights.
    """
    quiet()
    with explained(key, checkpoint):
        where = located(key, checkpoint) or checkpoint
        network, report = kind.from_pretrained(where, dtype=dtype, output_loading_info=True)
    if lacking := sorted(report["missing_keys"]):
        raise SettingsError(
            f"{key}={checkpoint}: {len(lacking)} weights of transformers' {kind.__name__} are not in it (such as "
            f"{lacking[0]}), so that it would guess. Give a checkpoint in transformers' own format"
        )
    return network.requires_grad_(False).eval()
