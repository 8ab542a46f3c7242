"""What every test may use: the typed settings are registered, and composed by one fixture."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from otl.cli import PluginConf, spelled_out
from otl.config import register
from otl.mistakes import compose_settings

# Of tests with `trainer.deterministic=true`: cuBLAS reads it when the first of all tests is on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A shell's job in the background ignores Ctrl-C, and so would all commands of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples on every machine and in every run; a failure is repeated by running the test again.
hypothesis.settings.register_profile("otl", derandomize=True, database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("otl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also what takes minutes: see the marker long")
    parser.addoption("--write-support", action="store_true", help="docs/support.md: what tests/test_support.py finds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests go first: at the end one of several processes would be alone with the last of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not config.getoption("--long") and not config.getoption("--write-support"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --long"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By files, as `--dist loadfile`; the longest of them, tests/test_support.py, by its families."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid.partition("-")[0] if file == "tests/test_support.py" else file

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """The libraries' objects stay to the end: looking through them again and again took a fifth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def schema() -> None:
    """The typed settings and the search path of plugins, as `otl.cli.main` registers them."""
    register()
    Plugins.instance().register(PluginConf)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny networks are faster on one thread, and much faster where several tests run at once."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def apart() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process of its own, which keeps what torch cannot forget: a further device."""
    from tests import pretend

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), pretend.register) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint of the SD1.5 kind."""
    from tests import tiny

    return tiny.sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint of the SD2.1 kind."""
    from tests import tiny

    return tiny.sd2(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint of the SDXL kind."""
    from tests import tiny

    return tiny.sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def settings() -> Callable[..., DictConfig]:
    """Overrides -> composed settings."""
    return lambda *overrides: compose_settings(spelled_out(overrides), name="config")
