"""Which parts of a model a method trains."""

from __future__ import annotations

from typing import Any

from otl.config import SettingsError


def chosen_parts(parts: dict[str, Any]) -> dict[str, float | None]:
    """part -> learning rate, of those that are not None.

    Raises:
        SettingsError: nothing is chosen, or a part has a setting that does not exist.
    """
    chosen = {}
    for name, options in parts.items():
        if options is None:
            continue
        for key in options:
            if key != "lr":
                raise SettingsError(f"method.parts.{name}.{key}={options[key]}: no such setting; a part has lr")
        chosen[name] = options.get("lr")
    if not chosen:
        raise SettingsError("method.parts: no part is chosen, so nothing would train; set method.parts.denoiser={}")
    return chosen
