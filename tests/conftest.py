"""What every test may use: the typed settings are registered, and composed by one fixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from otl.cli import PluginConf
from otl.config import register
from otl.mistakes import compose_settings


@pytest.fixture(scope="session", autouse=True)
def schema() -> None:
    """The typed settings and the search path of plugins, as `otl.cli.main` registers them."""
    register()
    Plugins.instance().register(PluginConf)


@pytest.fixture
def settings() -> Callable[..., DictConfig]:
    """Overrides -> composed settings."""
    return lambda *overrides: compose_settings(overrides, name="config")
