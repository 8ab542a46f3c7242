"""Files that appear whole or not at all, on the disk before they have their name; and safetensors files so written."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from otl.config import RunEnded, SettingsError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILING = NO_ROOM | {errno.EIO, errno.EROFS}  # what a disk says that is full or breaks
PICKLED = (".pt", ".bin", ".ckpt")  # files of torch.save
ASIDE = re.compile(r"\.(.+)\.\d+\.writing")  # a name on the way to another; left over where a process was killed


class DiskError(RunEnded):
    """A file could not be written: the disk is full or failing. Nothing half written has its name."""

    on_all_ranks = False

    def __init__(self, path: Path, error: OSError) -> None:
        self.number, self.reason = error.errno, f"{error.strerror or error} ({free_space(path.parent)} are free there)"
        super().__init__(
            f"{destination(path)} cannot be written: {self.reason}. Nothing half written is left; make room or mend "
            "the disk, and go on with resume=auto"
        )


@contextmanager
def whole(path: Path, *, needs: int = 0) -> Iterator[Path]:
    """A path beside `path` to write to; on leaving without an error it is on the disk and takes its place.

    Args:
        needs: bytes that are to be written, where that is known.

    Raises:
        DiskError: it cannot be written, or the disk has no room for so many bytes.
    """
    aside = aside_of(path)
    with named(path):
        require_free(path, needs)
        try:
            yield aside
            flush(aside)
            os.replace(aside, path)
            flush(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, needs: int = 0) -> Iterator[Path]:
    """The same for a folder. What had its name before is whole until it is away."""
    aside, before = aside_of(path), aside_of(path.with_name(f"{path.name}.before"))
    with named(path):
        require_free(path, needs)
        try:
            aside.mkdir()
            yield aside
            for entry in [*aside.rglob("*"), aside]:
                flush(entry)
            if path.exists():
                os.replace(path, before)
            os.replace(aside, path)
            flush(path.parent)
        finally:
            if before.exists() and not path.exists():
                os.replace(before, path)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(before, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.writing")


def destination(path: Path) -> Path:
    """What is to become of a path made by `aside_of`; any other path itself."""
    found = ASIDE.fullmatch(path.name)
    return path if found is None else destination(path.with_name(found[1]))


def sweep(folder: Path) -> list[Path]:
    """Delete what killed processes have left in `folder`, whose run nobody else is writing."""
    found = [entry for entry in folder.iterdir() if ASIDE.fullmatch(entry.name)] if folder.is_dir() else []
    for entry in found:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return found


@contextmanager
def named(path: Path, numbers: set[int] | None = None) -> Iterator[None]:
    """An error of the disk in here says which file it is about.

    Args:
        numbers: the system's numbers of errors that are of the disk, of whatever file in `path` or elsewhere; None: all
            are, and of this file.

    Raises:
        DiskError: in the place of an OSError.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise DiskError(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error
    except SettingsError:  # says itself which file it is about
        raise
    except ValueError as error:  # as Lightning calls whatever a logger cannot do
        cause = error.__cause__
        if not isinstance(cause, OSError) or (numbers is not None and cause.errno not in numbers):
            raise
        raise DiskError(path, cause) from error
    except OSError as error:
        if numbers is not None and error.errno not in numbers:
            raise
        # Its own name where it has one: it may lie on another disk, as the cache does.
        closer = numbers is not None and isinstance(error.filename, str | Path)
        raise DiskError(Path(error.filename) if closer else path, error) from error


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def require_free(path: Path, count: int) -> None:
    """Raises OSError: there are not as many bytes free as are to be written to `path`."""
    if count and shutil.disk_usage(existing(path.parent)).free < count:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, it needs {size(count)}")


def free_space(folder: Path) -> str:
    """Such as 1.5 GB."""
    return size(shutil.disk_usage(existing(folder)).free)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there: they lie on the same disk."""
    while not folder.exists():
        folder = folder.parent
    return folder


def size(count: float) -> str:
    """Bytes as one reads them: "12 kB", "734 MB", "1.5 GB"."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and header fields to a safetensors file.

    Raises:
        ValueError: a tensor holds NaN or infinity, or a header field is no string.
        DiskError: it cannot be written.
    """
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise SettingsError(
            f"{destination(path)} was not written: {listed(broken)} would hold NaN or infinity. "
            "If output.dtype=fp16, bf16 and fp32 reach further"
        )
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(
            f"{destination(path)} was not written: header fields must be strings, which {listed(wrong)} is not"
        )
    with whole(path, needs=bytes_of(tensors.values())) as aside:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, aside, metadata)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their numbers, each tensor for itself."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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


def read_any(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of a safetensors file, or of one of torch.save, which has no header.

    Raises:
        SettingsError: it is not there, damaged, unpacks to more than the file, or holds anything but tensors by name.
    """
    if path.suffix not in PICKLED:
        return read(path)
    content = unpickled(path)
    if not isinstance(content, dict) or not content:
        raise SettingsError(f"{path}: holds no tensors by name")
    if others := [str(key) for key, value in content.items() if not isinstance(key, str) or not is_plain(value)]:
        raise SettingsError(f"{path}: holds more than plain tensors by name: {listed(others)}")
    require_room(bytes_of(content.values()), path)  # a view has as many numbers as it says
    return content, {}


def unpickled(path: Path, *classes: type, mmap: bool = False) -> Any:
    """What a file of torch.save holds: tensors and plain values, for whatever else is in it could run code.

    Args:
        classes: others that may be in it.
        mmap: whether its tensors stay on the disk.

    Raises:
        SettingsError: it is not there or damaged, something else is in it, or it unpacks to more than the file.
    """
    refuse_packed(path)
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise SettingsError(f"{path}: not a whole file of tensors alone; others could run code") from error


def refuse_packed(path: Path) -> None:
    """Refuse a file of torch.save whose members, by its directory, are more than the file; early versions had none.

    Raises:
        SettingsError: they are, or it is cut off.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            require_room(sum(info.file_size for info in archive.infolist()), path)
    except zipfile.BadZipFile as error:
        raise SettingsError(f"{path}: not a whole file of tensors ({error})") from error


def require_room(claimed: int, path: Path) -> None:
    """Refuse a file that says it holds more bytes than it has: torch packs nothing, and it could fill the memory."""
    if claimed > (room := path.stat().st_size):
        raise SettingsError(
            f"{path}: says it holds {claimed} bytes, and the file has {room}: torch wrote no such; give a .safetensors"
        )


def require_numbers(name: str, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors with NaN or infinity in fp32, or with whole numbers, which some program has packed."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise SettingsError(f"{name}: {key} holds {str(tensor.dtype).removeprefix('torch.')}, not real numbers")
        if not torch.isfinite(tensor.float()).all():
            raise SettingsError(f"{name}: {key} holds NaN or infinity: the file was broken when it was written")


def is_plain(value: Any) -> bool:
    """Whether it is a tensor that lies in memory number by number."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested or value.is_meta)
    )


def tensors_hash(path: Path) -> str:
    """SHA-256 of a safetensors file's tensors, in hexadecimal: the same whatever the header says."""
    with path.open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(names: list[str], limit: int = 8) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
