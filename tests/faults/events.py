"""What happens to a run: the operating system, and nothing of OTL, is made to fail."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.faults.moments import MARK, REFUSALS

OFF = 1e6  # seconds that a clock is off
ERRORS = (errno.ENOSPC, errno.EIO)


def killed(name: str) -> None:
    """kill -9, the power, the kernel: nothing is told and nothing is cleaned up."""
    print(f"{MARK}killed {name}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def worker_killed(name: str) -> None:
    """What the kernel does to a loader's worker where the memory is full."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    print(f"{MARK}{len(workers)} workers killed {name}", flush=True)


def refused(number: int) -> Callable[[str], None]:
    """The operating system says no."""

    def refuse(name: str) -> None:
        if name.startswith(REFUSALS):
            print(f"{MARK}{errno.errorcode[number]} {name}", flush=True)
            raise OSError(number, os.strerror(number))

    return refuse


def clock_off(seconds: float) -> None:
    """The clock on the wall, and no other, says something else."""
    now = time.time
    time.time = lambda: now() + seconds


def cut_off(path: Path, draw: random.Random) -> None:
    """A file loses its end."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def wrong_byte(path: Path, draw: random.Random) -> None:
    """One byte of the largest tensor in a torch file is another one."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda each: each.file_size)
    with path.open("r+b") as file:
        file.seek(entry.header_offset + 26)
        names = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        place = entry.header_offset + 30 + names + draw.randrange(entry.file_size)
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ 0xFF]))


def moved_in_time(paths: list[Path], draw: random.Random) -> None:
    """Files seem to have been written in another order."""
    for path in paths:
        moment = draw.uniform(1e9, 2e9)
        os.utime(path, (moment, moment))


def red(image: Path) -> None:
    Image.new("RGB", (64, 64), (255, 0, 0)).save(image)
    if not image.with_suffix(".txt").exists():
        other_caption(image)


def other_caption(image: Path) -> None:
    image.with_suffix(".txt").write_text("another caption")


@contextmanager
def changed(image: Path, change: Callable[[Path], None]) -> Iterator[None]:
    """An image and its caption are others in here, or are there in here only."""
    files = (image, image.with_suffix(".txt"))
    before = {file: file.read_bytes() for file in files if file.exists()}
    change(image)
    yield
    for file in files:
        if file in before:
            file.write_bytes(before[file])
        else:
            file.unlink()
