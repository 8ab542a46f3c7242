"""A snapshot does not change while training goes on."""

from __future__ import annotations

import torch

from otl.callbacks.snapshot import bytes_of, fits, snapshot


def test_neither_tensors_nor_containers_change_with_the_original() -> None:
    weight = torch.zeros(3)
    state = {"weights": {"a": weight}, "groups": [{"lr": 0.1}], "pair": (weight, "x")}
    held = snapshot(state)
    weight.add_(1)
    state["groups"][0]["lr"] = 9
    assert held["weights"]["a"].tolist() == held["pair"][0].tolist() == [0, 0, 0]
    assert held["groups"] == [{"lr": 0.1}] and held["pair"][1] == "x"


def test_bytes_are_counted_once_for_each_storage() -> None:
    weight = torch.zeros(10, dtype=torch.float64)
    assert bytes_of({"a": weight, "b": [weight[:5], torch.zeros(3, dtype=torch.int8)], "c": "text"}) == 83


def test_memory_has_room_for_little_and_not_for_everything() -> None:
    assert fits(1000) and not fits(2**60)
