"""Checkpoints that several tests of the tools read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools import tiny


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP that knows three colours."""
    folder = tiny.blip(tmp_path_factory.mktemp("blip"))
    tiny.teach_colours(folder)
    return folder


@pytest.fixture(scope="session")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clipseg(tmp_path_factory.mktemp("clipseg"))
