"""Paths, names on the hub and URLs: which is which, and what a URL needs to be read. Imports no torch."""

from __future__ import annotations

import re
from importlib.util import find_spec

from otl.wording import meant

PACKAGES = {  # protocol -> the package that fsspec needs for it, and how to get that
    "s3": ("s3fs", "pip install 'otl[data]'"),
    "s3a": ("s3fs", "pip install 'otl[data]'"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "gcs": ("gcsfs", "pip install gcsfs"),
    "az": ("adlfs", "pip install adlfs"),
    "abfs": ("adlfs", "pip install adlfs"),
    "http": ("aiohttp", "pip install aiohttp"),
    "https": ("aiohttp", "pip install aiohttp"),
    "hf": ("huggingface_hub", "pip install huggingface_hub"),
}


# Protocols by which a table may name images: others open files of this machine, log in elsewhere with its keys, or
# write what they fetch to its disk.
LISTED = (*PACKAGES, "memory")
NAMED = {"hf": "datasets/OWNER/NAME", "http": "HOST/FILE", "https": "HOST/FILE"}  # of others a bucket
HUB = re.compile(r"[\w-]+/[\w.-]+")  # how the hub names a dataset


def is_place(source: str) -> bool:
    """Whether weights are meant by where they lie on a disk: a name on the hub is `owner/name`, or begins so."""
    return source.startswith((".", "/", "~"))


def looks_like_path(checkpoint: str) -> bool:
    """A hub name is `owner/name`; anything else can only be meant as a path."""
    return is_place(checkpoint) or checkpoint.count("/") != 1 or checkpoint.endswith(".safetensors")


def is_url(path: str) -> bool:
    return "://" in path


def hub_hint(path: str) -> str:
    """What to give instead of a path that is not there, where it looks like a dataset of the hub."""
    return f"; for that dataset of the hub, give hf://datasets/{path}" if HUB.fullmatch(path) else ""


def unlisted(url: str) -> str:
    """Why a table, which may be a stranger's, may not name an image by that URL; empty: it may."""
    protocol = url.partition("://")[0]
    if protocol in LISTED:
        return ""
    return f"a list may name images by path, or by {', '.join(PACKAGES)}, and not by {protocol}"


def unreadable(url: str) -> str | None:
    """Why nothing can be read from there; None: it can, as far as the URL and what is installed tell."""
    import fsspec  # only here: most runs read folders

    protocol, _, rest = url.partition("://")
    if protocol in PACKAGES and not rest.partition("/")[0]:
        what = NAMED.get(protocol, "BUCKET/FOLDER")
        return f"it names nothing: give {protocol}://{what}"
    package, install = PACKAGES.get(protocol, (None, ""))
    if package is not None:
        return None if find_spec(package) else f"{protocol}:// needs {package}, which is not installed; {install}"
    known = fsspec.available_protocols()
    if protocol not in known:
        return f"{protocol}:// is no protocol that fsspec knows{meant(protocol, ['https', 's3', 'hf', *known])}"
    return None
