"""The global generators come back as they were."""

from __future__ import annotations

import io
import random

import numpy
import torch

from otl.callbacks import randomness


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
