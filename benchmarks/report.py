"""Numbers as tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Of neighbours: what disturbs the machine for a while disturbs both."""
    return spread([a / b for a, b in zip(over, under)])


def show_spread(values: dict[str, float], form: str = ".3f") -> str:
    """ "1.012 (1.003 .. 1.020)": median, lowest, highest."""
    return f"{values['median']:{form}} ({values['min']:{form}} .. {values['max']:{form}})"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(title=title)
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    Console(width=None if os.isatty(1) else 160).print(shown)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    Console().print(f"written to {path}")


def machine() -> dict[str, Any]:
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # of the last minute: other work on the machine disturbs what is measured
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    found = subprocess.run(["lscpu"], capture_output=True, text=True).stdout if platform.system() == "Linux" else ""
    names = [line.split(":", 1)[1].strip() for line in found.splitlines() if line.startswith("Model name")]
    return names[0] if names else platform.processor()
