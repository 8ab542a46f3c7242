"""The global generators come back as they were."""

from __future__ import annotations

import io
import multiprocessing
import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch
from torch import distributed

from otl.callbacks import randomness
from otl.callbacks.checkpoint import Checkpoint


def draws() -> list[float]:
    """Normal numbers too: Python and NumPy keep the second of a pair for later."""
    return [random.gauss(0, 1), float(numpy.random.normal()), float(torch.randn(()))]


def test_states_survive_a_file_that_holds_plain_values_only() -> None:
    draws()
    file = io.BytesIO()
    torch.save(randomness.states(), file)
    expected = [draws() for _ in range(3)]
    file.seek(0)
    randomness.restore(torch.load(file, weights_only=True))
    assert [draws() for _ in range(3)] == expected


def test_what_is_drawn_inside_is_not_noticed() -> None:
    saved = randomness.states()
    expected = draws()
    randomness.restore(saved)
    with randomness.kept():
        draws()
    assert draws() == expected


def test_every_rank_has_its_own_again(tmp_path: Path) -> None:
    """Two processes, of which the second has drawn something: dropout on batches of another size does."""

    def share(rank: int) -> None:
        store = distributed.FileStore(f"{tmp_path}/store", 2)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        torch.manual_seed(7)
        torch.rand(rank)
        torch.save(randomness.of_all_ranks(), tmp_path / f"{rank}")

    processes = [multiprocessing.get_context("fork").Process(target=share, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in (0, 1):
        checkpoint, saved = Checkpoint(), torch.load(tmp_path / f"{1 - rank}", weights_only=True)
        trainer = SimpleNamespace(global_rank=rank, world_size=2)
        content = {"randomness": saved, "unvalidated": False, "world_size": 2}
        checkpoint.on_load_checkpoint(trainer, None, content)  # type: ignore[arg-type]
        torch.manual_seed(7)
        torch.rand(rank)
        expected = torch.rand(3)
        randomness.restore(checkpoint._randomness or {})
        assert torch.equal(torch.rand(3), expected)
