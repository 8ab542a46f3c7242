"""Ways to keep a cache on disk, side by side: how fast they write, open and read, and what room they take.

    python -m benchmarks.formats --entries 1000 --tiny 1000000

Entries are latents of SDXL at 1024 pixels; --tiny: so many entries of 32 bytes, for the time until all can be read.
LMDB and Arrow are compared where they are installed (pip install lmdb pyarrow); OTL does not need them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import report
from otl.datamodules.cache import Cache
from otl.datamodules.shards import Origin

LATENTS = (4, 128, 128)
TINY = (8,)
BATCH = 8
READS = 200  # random entries in a round
SHARD = 256  # entries in a file of the formats that have several in one
FILES = 50_000  # more files than this are not made


class Reader(Protocol):
    """An open cache; entries by number."""

    def read(self, numbers: Sequence[int]) -> Tensor:
        """[B, ...] float32."""
        ...


class FileEach:
    """One safetensors file an entry, in 256 folders."""

    def __init__(self, folder: Path, keys: list[str], shape: tuple[int, ...]) -> None:
        self.paths = [folder / key[:2] / f"{key}.safetensors" for key in keys]
        if not all(path.is_file() for path in self.paths):  # what a run has to know before it begins
            raise FileNotFoundError(folder)

    @staticmethod
    def write(folder: Path, keys: list[str], entries: Sequence[Tensor]) -> None:
        for key, entry in zip(keys, entries):
            path = folder / key[:2] / f"{key}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file({"latents": entry}, path)

    def read(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([load_file(self.paths[number])["latents"] for number in numbers])


class Stacked:
    """Safetensors files of many entries, read by safetensors itself."""

    def __init__(self, folder: Path, keys: list[str], shape: tuple[int, ...]) -> None:
        self.paths = sorted(folder.glob("*.safetensors"))
        self.slices = [safe_open(path, "pt").get_slice("latents") for path in self.paths]

    @staticmethod
    def write(folder: Path, keys: list[str], entries: Sequence[Tensor]) -> None:
        for start in range(0, len(keys), SHARD):
            save_file(
                {"latents": torch.stack(list(entries[start : start + SHARD]))}, folder / f"{start:09}.safetensors"
            )

    def read(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([self.slices[number // SHARD][number % SHARD] for number in numbers])


class Mapped(Stacked):
    """The same files, through a memory map of each."""

    def __init__(self, folder: Path, keys: list[str], shape: tuple[int, ...]) -> None:
        self.maps = []
        for path in sorted(folder.glob("*.safetensors")):
            start = 8 + int.from_bytes(_first(path), "little")
            self.maps.append(np.memmap(path, np.float32, "r", offset=start).reshape(-1, *shape))

    def read(self, numbers: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.maps[number // SHARD][number % SHARD] for number in numbers]))


class Otl:
    """OTL's: shards with keys and checksums."""

    def __init__(self, folder: Path, keys: list[str], shape: tuple[int, ...]) -> None:
        self.entries = Cache(folder).entries(keys)

    @staticmethod
    def write(folder: Path, keys: list[str], entries: Sequence[Tensor]) -> None:
        cache = Cache(folder)
        for key, entry in zip(keys, entries):
            cache.put(key, {"latents": entry}, Origin("image", "Benchmark", ""))
        cache.flush()

    def read(self, numbers: Sequence[int]) -> Tensor:
        return self.entries.read(numbers)["latents"]


class Lmdb:
    """One LMDB: key -> bytes."""

    def __init__(self, folder: Path, keys: list[str], shape: tuple[int, ...]) -> None:
        import lmdb

        self.keys, self.shape = [bytes.fromhex(key) for key in keys], shape
        self.transaction = lmdb.open(str(folder), readonly=True, lock=False).begin(buffers=True)

    @staticmethod
    def write(folder: Path, keys: list[str], entries: Sequence[Tensor]) -> None:
        import lmdb

        with lmdb.open(str(folder), map_size=2**40) as environment:
            for start in range(0, len(keys), SHARD):
                with environment.begin(write=True) as transaction:
                    for key, entry in zip(keys[start : start + SHARD], entries[start : start + SHARD]):
                        transaction.put(bytes.fromhex(key), entry.numpy().tobytes())

    def read(self, numbers: Sequence[int]) -> Tensor:
        found = [np.frombuffer(self.transaction.get(self.keys[n]), np.float32).reshape(self.shape) for n in numbers]
        return torch.from_numpy(np.stack(found))


class Arrow:
    """One Arrow file: batches of binary rows, memory-mapped."""

    def __init__(self, folder: Path, keys: list[str], shape: tuple[int, ...]) -> None:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(folder / "entries.arrow")))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.columns, self.shape = [batch.column(1) for batch in batches], shape

    @staticmethod
    def write(folder: Path, keys: list[str], entries: Sequence[Tensor]) -> None:
        import pyarrow as pa

        schema = pa.schema([("key", pa.binary(20)), ("latents", pa.binary())])
        with pa.OSFile(str(folder / "entries.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for start in range(0, len(keys), SHARD):
                rows = [entry.numpy().tobytes() for entry in entries[start : start + SHARD]]
                names = [bytes.fromhex(key) for key in keys[start : start + SHARD]]
                writer.write(pa.record_batch([pa.array(names, pa.binary(20)), pa.array(rows, pa.binary())], schema))

    def read(self, numbers: Sequence[int]) -> Tensor:
        rows = [self.columns[number // SHARD][number % SHARD].as_buffer() for number in numbers]
        return torch.from_numpy(np.stack([np.frombuffer(row, np.float32).reshape(self.shape) for row in rows]))


FORMATS: dict[str, Any] = {
    "file each": FileEach,
    "stacked, safe_open": Stacked,
    "stacked, memory map": Mapped,
    "otl": Otl,
    "lmdb": Lmdb,
    "arrow": Arrow,
}


def _first(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--entries", type=int, default=1000, help="of the usual size")
    parser.add_argument("--tiny", type=int, nargs="*", default=[20_000], help="entries of 32 bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/formats.json"))
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> dict[str, Any]:
    asked = arguments(line)
    libraries = {"lmdb": "lmdb", "arrow": "pyarrow"}
    there = {name: kind for name, kind in FORMATS.items() if importlib.util.find_spec(libraries.get(name, "torch"))}
    with tempfile.TemporaryDirectory(dir=asked.folder) as aside:
        found = usual(there, Path(aside), asked.entries, asked.rounds)
        for count in asked.tiny:
            for name, seconds in opened(there, Path(aside), count).items():
                found[name][f"open_{count}_s"] = seconds
    results = {"entries": asked.entries, "formats": found}
    show(found, asked.tiny)
    report.write(asked.out, results)
    return results


def keys(count: int) -> list[str]:
    return [hashlib.sha1(str(number).encode()).hexdigest() for number in range(count)]


def usual(formats: dict[str, Any], folder: Path, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Microseconds an entry of the usual size, and the room taken; the formats in turns."""
    names, rows = keys(count), list(torch.randn(count, *LATENTS))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in formats}
    for number in range(rounds):
        order = np.random.default_rng(number).integers(0, count, READS).tolist()
        for name, kind in formats.items():
            times[name].append(measure(kind, fresh(folder / name), names, rows, order))
    return {
        name: {what: report.spread([each[what] for each in noted]) for what in noted[0]}
        for name, noted in times.items()
    }


def measure(kind: Any, folder: Path, names: list[str], rows: list[Tensor], order: list[int]) -> dict[str, float]:
    """One format once: write, read from the disk, read from the system's memory."""
    found = {"write": timed(lambda: (kind.write(folder, names, rows), flushed(folder)), len(rows))}
    evict(folder)
    reader = kind(folder, names, LATENTS)
    found["cold"] = timed(lambda: [reader.read([number]) for number in order], READS)
    reader.read(range(len(rows)))
    found["read"] = timed(lambda: [reader.read([number]) for number in order], READS)
    batches = [order[start : start + BATCH] for start in range(0, READS, BATCH)]
    found["batch"] = timed(lambda: [reader.read(batch) for batch in batches], READS)
    if not torch.equal(reader.read([order[0]])[0], rows[order[0]]):
        raise RuntimeError(f"{folder.name} gives another entry than was written")
    room = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
    return found | {"room": room / (len(rows) * rows[0].nbytes)}


def opened(formats: dict[str, Any], folder: Path, count: int) -> dict[str, float | None]:
    """Seconds until all of very many entries can be read."""
    names, rows = keys(count), list(torch.zeros(count, *TINY))
    found: dict[str, float | None] = {}
    for name, kind in formats.items():
        if kind is FileEach and count > FILES:
            found[name] = None
            continue
        here = fresh(folder / name)
        kind.write(here, names, rows)
        started = time.perf_counter()
        reader = kind(here, names, TINY)
        reader.read([count - 1])
        found[name] = time.perf_counter() - started
        del reader
        shutil.rmtree(here)
    return found


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def flushed(folder: Path) -> None:
    """All files on the disk, as OTL's are before they have their names."""
    for path in folder.rglob("*"):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def evict(folder: Path) -> None:
    """Out of the system's memory, so that reading means the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)


def timed(run: Callable[[], Any], count: int) -> float:
    """Microseconds for each of so many."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) / count * 1e6


def show(found: dict[str, dict[str, Any]], tiny: Sequence[int]) -> None:
    rows = []
    for name, values in found.items():
        cells = [report.show_spread(values[key], ".0f") for key in ("write", "read", "batch", "cold")]
        opening = [values[f"open_{count}_s"] for count in tiny]
        cells += [f"{values['room']['median']:.3f}"] + ["" if s is None else f"{s:.2f}" for s in opening]
        rows.append([name, *cells])
    columns = ["", "write, us", "read, us", f"in batches of {BATCH}, us", "cold, us", "room / data"]
    report.table("Formats, an entry", [*columns, *(f"open {count:,}, s" for count in tiny)], rows)


if __name__ == "__main__":
    main()
