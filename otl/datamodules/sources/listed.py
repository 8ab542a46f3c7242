"""What a table may name, which may be a stranger's: any path, since people have such tables, and not any address."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from otl.datamodules.files import Remote
from otl.datamodules.sources.items import Item
from otl.trust import public
from otl.types import Problem
from otl.urls import is_url, unlisted
from otl.wording import counted


def refused(table: Path | Remote, *names: object) -> Item | None:
    """In the place of an image, why a table may not name it or its mask so; None: it may.

    Args:
        names: paths or URLs; whatever else a row may have in their place is passed over.
    """
    for name in names:
        if isinstance(name, str) and is_url(name) and (why := unlisted(name)):
            return Item(table, f"{table.name}/{public(name)}", flaw=f"it names {public(name)}, and {why}")
    return None


def outside(table: Path | Remote, items: Iterable[Item], setting: str) -> list[Problem]:
    """That a table on this disk names files which do not lie below it: they are read, and should surprise nobody.

    Links are taken as they stand: they may lead to another disk, as the hub's cache has them.
    """
    if not isinstance(table, Path):
        return []
    folder = Path(os.path.abspath(table.parent))
    files = [file for item in items for file in (item.file, item.mask) if isinstance(file, Path)]
    strange = [str(file) for file in files if not Path(os.path.abspath(file)).is_relative_to(folder)]
    if not strange:
        return []
    message = f"{table} names {counted(len(strange), 'file')} outside of its folder; they are read and trained on"
    return [Problem(setting, message, False, strange)]
