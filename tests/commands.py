"""Commands run as processes, and packages made on the spot."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from otl.config import PACKAGE

ROOT = PACKAGE.parent


@dataclass
class Result:
    """A finished command."""

    code: int
    out: str  # stdout
    err: str  # stderr
    seconds: float  # processor time: the wall's depends on what else the machine does
    memory: int = 0  # bytes at the most


def surroundings() -> dict[str, str]:
    """The environment of a command."""
    return {name: value for name, value in os.environ.items() if name not in {"HYDRA_FULL_ERROR", "PYTHONPATH"}}


def run_process(
    command: Sequence[str | Path], cwd: Path, *paths: Path, timeout: float = 800, **environment: str
) -> Result:
    """Run a command in a folder, with folders in front of Python's path."""
    joined = os.pathsep.join(str(path) for path in paths)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=surroundings() | {"PYTHONPATH": joined} | environment,
            stdout=out,
            stderr=err,
        )
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)  # of this process alone: getrusage knows the largest child ever
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    return Result(process.returncode, *texts, seconds=used.ru_utime + used.ru_stime, memory=used.ru_maxrss * 1024)


def run_otl(*arguments: str, cwd: Path, path: Sequence[Path] = (ROOT,), **environment: str) -> Result:
    """`python -m otl` in a folder."""
    return run_process([sys.executable, "-m", "otl", *arguments], cwd, *path, **environment)


@functools.cache
def warm() -> subprocess.Popen[str]:
    """The process that `forked` commands come from: one for all tests of this process, with which it ends."""
    environment = surroundings() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.warm"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    return process


def fork_otl(*arguments: str, cwd: Path, path: Sequence[Path] = (ROOT,), timeout: int = 800) -> Result:
    """`python -m otl` in a folder, without the seconds that importing the libraries takes; see tests/warm.py."""
    process = warm()
    assert process.stdin is not None and process.stdout is not None
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
        asked = {
            "words": arguments,
            "cwd": str(cwd),
            "path": [str(folder) for folder in path],
            "environment": surroundings() | {"OMP_NUM_THREADS": "1"},
            "files": [out.name, err.name],
            "timeout": timeout,
        }
        print(json.dumps(asked), file=process.stdin, flush=True)
        code, seconds, memory = json.loads(process.stdout.readline())
        return Result(code, out.read(), err.read(), seconds, memory)


def run_to_learn(preset: str, *arguments: str, folder: Path) -> Result:
    """A preset, run to its end in `folder / "RUN"` with a cache of its own."""
    own = (f"experiment={preset}", "hydra.run.dir=RUN", f"data.cache_dir={folder / 'cache'}")
    done = run_otl(*own, *arguments, cwd=folder)
    assert done.code == 0, done.err
    return done


def write_plugin(folder: Path, package: str, *, models: str = "", files: dict[str, str] | None = None) -> Path:
    """An installed distribution: a package, its files, and the metadata of its entry points.

    Args:
        folder: put on Python's path by the caller.
        package: name of the package; the distribution's is the same with a hyphen.
        models: lines of the entry-point group otl.models.
        files: path inside the package -> text.
    """
    for name, text in {"__init__.py": "", **(files or {})}.items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    distribution = package.replace("_", "-")
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[otl.models]\n{models}\n")
    return folder


def listed(group: str, *more: str) -> str:
    """The line of `--help` with a group's options, those of plugins (`more`) among them."""
    return f"{group}: {', '.join(sorted([*(path.stem for path in (ROOT / 'conf' / group).glob('*.yaml')), *more]))}"
