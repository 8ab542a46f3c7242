"""One small set of pictures with captions, in every kind of source."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from otl.config import Concept, Data, Inpaint
from otl.datamodules.scan import scan
from otl.types import Problem, Sample

NAMES = ("a.png", "b.png", "sub/c.png")


def png(shade: int, *, h: int = 48, w: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (w, h), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def contents() -> dict[str, bytes]:
    """Name -> what is in the file: three pictures, each with its caption."""
    files = {name: png(shade) for shade, name in enumerate(NAMES)}
    return files | {name.replace("png", "txt"): f"caption of {name}".encode() for name in NAMES}


def folder(root: Path) -> Path:
    for name, content in contents().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tar(path: Path, files: dict[str, bytes] | None = None) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in (files or contents()).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def memory(prefix: str, files: dict[str, bytes]) -> str:
    """The URL of files in memory."""
    store = fsspec.filesystem("memory")
    for name, content in files.items():
        store.pipe(f"/{prefix}/{name}", content)
    return f"memory://{prefix}"


Searched = Callable[..., tuple[list[Sample], list[Problem]]]


@pytest.fixture
def searched(tmp_path: Path) -> Searched:
    """Path and fields of a concept -> what a scan finds there."""

    def _searched(path: object, inpaint: Inpaint | None = None, **fields: object) -> tuple[list[Sample], list[Problem]]:
        concept = Concept(path=str(path), **fields)
        return scan(Data(concepts={"c": concept}, cache_dir=str(tmp_path / "cache")), inpaint)

    return _searched
