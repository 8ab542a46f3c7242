"""Captions for images that have none: sentences around an embedding's placeholder."""

from __future__ import annotations

from collections.abc import Iterable

from otl.config import SettingsError
from otl.wording import meant

OBJECT = (
    "a photo of {}",
    "a picture of {}",
    "a close-up of {}",
    "a bright photo of {}",
    "a dark photo of {}",
    "a sharp photo of {}",
    "a photo of one {}",
    "a photo that shows {}",
    "a snapshot of {}",
    "{} seen from the front",
    "{} in a photo",
    "there is {} in the picture",
)
STYLE = (
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a drawing in the style of {}",
    "an artwork in the style of {}",
    "a small picture in the style of {}",
    "a large picture in the style of {}",
    "a work of art by {}",
    "a scene as {} shows it",
    "an image, {}",
)
SETS = {"object": OBJECT, "style": STYLE}


def chosen(templates: str | list[str] | None) -> tuple[str, ...]:
    """The sentences that a setting means; `{}` in each is the placeholder.

    Raises:
        SettingsError: there is no such set, or a sentence without `{}`.
    """
    if templates is None:
        return ()
    if isinstance(templates, str):
        if templates not in SETS:
            raise SettingsError(
                f"method.templates={templates}: give {' or '.join(SETS)}, or a list such as ['a photo of {{}}']"
                f"{meant(templates, list(SETS))}"
            )
        return SETS[templates]
    for template in templates:
        if "{}" not in str(template):
            raise SettingsError(f"method.templates: {template!r} has no {{}}, where the placeholder goes; write it in")
    return tuple(templates)


def require_source(setting: str, *, read: bool) -> None:
    """Raises SettingsError: prompts, which templates become, are no source of captions.

    Args:
        setting: the options of the captions, such as data.captions.
        read: whether prompts are.
    """
    if not read:
        raise SettingsError(
            f"method.templates: would have no effect: they are prompts, and {setting}.sources has no prompt; put it in"
        )


def captions(templates: Iterable[str], placeholders: dict[str, str], concept: str) -> list[str]:
    """The captions of an image of `concept` that has none of its own; empty where it is not clear what it shows.

    Args:
        templates: sentences with `{}`.
        placeholders: name of an embedding -> its placeholder; the one named like the concept is meant, or the only one.
    """
    if concept not in placeholders and len(placeholders) > 1:
        return []
    placeholder = placeholders.get(concept) or next(iter(placeholders.values()))
    return [template.replace("{}", placeholder) for template in templates]
