"""How each job of a sweep ended: one that fails does not keep the rest from running. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

FILE = "outcome.json"


@dataclass
class Outcome:
    """How one job ended."""

    job: int  # number in the sweep
    line: list[str]  # the settings that are its own
    outcome: str  # "finished", "refused" or "failed"
    message: str  # why, where it did not finish; else empty
    seconds: float

    @property
    def good(self) -> bool:
        return self.outcome == "finished"


def write(outcome: Outcome, folder: Path) -> None:
    """outcome.json in the job's folder, whole or not at all."""
    aside = folder / f".{FILE}.writing"
    aside.write_text(json.dumps(asdict(outcome), indent=1), encoding="utf-8")
    os.replace(aside, folder / FILE)


def read(folder: Path) -> list[tuple[Path, Outcome]]:
    """The folder and the outcome of every job of a sweep, by number."""
    found = [(path.parent, Outcome(**json.loads(path.read_text("utf-8")))) for path in folder.rglob(FILE)]
    return sorted(found, key=lambda pair: pair[1].job)


def show(outcomes: list[tuple[Path, Outcome]]) -> None:
    """A table of all jobs on the console."""
    from rich.console import Console  # only here: it takes a tenth of a second
    from rich.table import Table

    finished = sum(outcome.good for _, outcome in outcomes)
    table = Table("job", "settings", "outcome", "time", "folder", title_justify="left")
    table.title = f"{finished} of {len(outcomes)} jobs finished"
    for folder, outcome in outcomes:
        said = outcome.outcome if outcome.good else f"{outcome.outcome}: {outcome.message.splitlines()[0]}"
        spent = time.strftime("%H:%M:%S", time.gmtime(outcome.seconds))
        table.add_row(str(outcome.job), " ".join(outcome.line), said, spent, str(folder))
    Console().print(table)


class Outcomes(Callback):
    """Hydra's word for what is done around a sweep: shows the table, and ends with code 1 if any job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        outcomes = read(Path(config.hydra.sweep.dir))
        if not outcomes:
            sys.stderr.write("the sweep has no jobs: nothing matches what it was asked to try\n")
            sys.exit(2)
        show(outcomes)
        if not all(outcome.good for _, outcome in outcomes):
            sys.exit(1)  # an exception would become a warning of Hydra's
