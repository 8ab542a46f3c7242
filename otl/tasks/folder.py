"""The run's folder: it is one run's alone, and what is in it is never written over."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from otl.callbacks.backups import FOLDER
from otl.callbacks.export import results
from otl.callbacks.metrics import NAME as TABLE
from otl.callbacks.sampling import FOLDER as PICTURES
from otl.config import SettingsError
from otl.formats.files import sweep
from otl.quiet import speaks
from otl.tasks import manifest, resuming
from otl.tasks.run import plain

log = logging.getLogger(__name__)

LOCK = ".lock"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other run writes into the folder meanwhile; what a killed one has left half written is swept away.

    Raises:
        SettingsError: another process is at work in it.
    """
    if not speaks():  # a further rank of the run that has the folder
        yield
        return
    with (folder / LOCK).open("a+") as file:
        try:
            # Ends with the process, however that ends; and the loader's workers do not inherit it, as with flock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise SettingsError(
                f"{folder} is in use by process {file.read() or '?'}: wait until that has ended, or choose another "
                "hydra.run.dir"
            ) from error
        except OSError as error:
            log.warning(f"{folder} cannot be locked ({error.strerror}): start no other run in it before this one ends")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for place in (folder, *folder.glob("samples/"), *folder.glob("samples/*/")):
            sweep(place)
        yield


def refuse_overwrite(settings: DictConfig, folder: Path, resume: Path | None) -> None:
    """A run never writes over another's results: files, checkpoints, pictures, table or record.

    Args:
        resume: the checkpoint that it goes on from; in the folder, the results there are its own. None with
            resume=auto: it begins anew, and may where the same run ended before its first checkpoint.
    """
    there, record = [*exported(settings, folder), *(folder / FOLDER).glob("*.ckpt")], earlier(folder)
    traces = [folder / TABLE, *sorted(folder.glob(f"{PICTURES}/*"))]
    traces += [folder / manifest.NAME] if record.get("step") else []
    goes_on = resume is not None and resume.absolute().parent == (folder / FOLDER).absolute()
    begun = settings.resume == "auto" and resume is None and record.get("outcome", "finished") != "finished"
    again = begun and not any(resuming.other_settings(record["settings"], plain(settings)))
    there += [path for path in traces if path.exists() and not again]
    if there and not goes_on and not settings.output.overwrite:
        raise SettingsError(
            f"{there[0]} is an earlier run's result: choose another hydra.run.dir, continue it with resume=auto, "
            "or replace it with output.overwrite=true"
        )


def earlier(folder: Path) -> dict[str, Any]:
    """The record of the run that has been in the folder; empty where there is none that can be read."""
    try:
        return json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def exported(settings: DictConfig, folder: Path) -> list[Path]:
    """The results that are there."""
    return results(folder / settings.output.name)
