"""What encoders made, kept on disk under a key that names all it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

import safetensors.torch
from torch import Tensor

from otl.config import SettingsError
from otl.datamodules import images
from otl.datamodules.views import View
from otl.types import Size

LENGTH = struct.Struct("<Q")  # a safetensors file begins with the length of its header, bytes


class Cache:
    """One safetensors file an entry. Entries appear whole or not at all, also with several processes at work.

    Args:
        folder: made when the first entry is put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry; None where there is none or it is damaged."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        split = _data_start(content)
        if split is None:
            return None
        header = json.loads(content[LENGTH.size : split])
        if header.get("__metadata__", {}).get("crc32") != str(zlib.crc32(content[split:])):
            return None
        return safetensors.torch.load(content)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep an entry.

        Raises:
            SettingsError: it cannot be written.
        """
        path = self.path(key)
        aside = path.with_name(f".{key}.{uuid.uuid4().hex}.writing")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                aside.write_bytes(_serialized(tensors))
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            raise SettingsError(
                f"data.cache_dir={self.folder}: cannot be written ({error}); make room, or choose another folder"
            ) from error

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no whole entry, each once, in their order. Reads headers only."""
        return [key for key in dict.fromkeys(keys) if not _whole(self.path(key))]


def image_key(content: str, original: Size, view: View, background: str, identity: str) -> str:
    """The key of an image's latents.

    Args:
        content: `content_hash` of the file.
        original: size of the file, upright, pixels.
        view: what of the image is shown.
        background: colour under transparent pixels.
        identity: `Encoder.image_identity()`.
    """
    return _key("image", images.VERSION, content, original, astuple(view), background, identity)


def masked_key(image: str, mask: str, version: int, fill: float) -> str:
    """The key of the latents of an image with a hole.

    Args:
        image: `image_key` of the image.
        mask: `content_hash` of the mask file.
        version: of how a mask is read.
        fill: value of the masked pixels, -1..1.
    """
    return _key("masked", version, image, mask, fill)


def prompt_key(prompt: str, identity: str) -> str:
    """The key of a caption's conditioning; `identity` is `Encoder.prompt_identity()`."""
    return _key("prompt", prompt, identity)


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def _serialized(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with a checksum of its data: a power cut can leave whole files of zeros."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(plain)
    start = _data_start(content)
    assert start is not None
    return safetensors.torch.save(plain, metadata={"crc32": str(zlib.crc32(content[start:]))})


def _data_start(content: bytes) -> int | None:
    """Where the tensors' bytes begin; None where the file is not whole."""
    if len(content) < LENGTH.size:
        return None
    start = LENGTH.size + LENGTH.unpack_from(content)[0]
    end = _data_end(content[LENGTH.size : start]) if start <= len(content) else None
    return start if end is not None and start + end == len(content) else None


def _data_end(header: bytes) -> int | None:
    """Bytes of all tensors by the header; None where it is none."""
    try:
        entries = json.loads(header)
        return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, AttributeError, TypeError, LookupError):
        return None


def _whole(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(LENGTH.size)
            length = LENGTH.unpack(first)[0] if len(first) == LENGTH.size else size
            end = _data_end(file.read(length)) if length < size else None
    except OSError:
        return False
    return end is not None and LENGTH.size + length + end == size
