"""What a file is: the same question for one on a disk and for one that lies elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

from otl.types import File


def content_hash(file: File) -> str:
    """What a file holds, as 32 hex digits: a hash of its bytes.

    Elsewhere than on a disk, a hash of what names the content for certain: nothing is fetched for it.
    """
    if not isinstance(file, Path):
        return hashlib.blake2b(file.identity().encode(), digest_size=16).hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
