"""Settings in JSON that came with a file, maybe a stranger's."""

from __future__ import annotations

import json
from typing import Any

from otl.config import SettingsError


def parsed(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        what: begins the message of an error.

    Raises:
        SettingsError: it is no JSON, nested beyond all reason, or no object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{what} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{what} holds no settings by name")
    return found
