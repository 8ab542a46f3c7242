"""When a part stops training, as it is written."""

import pytest

from otl.epochs import epochs_of, is_stop


@pytest.mark.parametrize(("text", "epochs"), [("1 epoch", 1), ("2 epochs", 2), ("10 epochs", 10), ("100 epochs", 100)])
def test_epochs_are_read_in_one_spelling(text, epochs):
    assert epochs_of(text) == epochs


@pytest.mark.parametrize(
    "text", ["", "3", "3 epoch", "1 epochs", "0 epochs", "0.5 epochs", "-1 epochs", "3epochs", "3 Epochs", "03 epochs"]
)
def test_any_other_spelling_is_none(text):
    assert epochs_of(text) is None


@pytest.mark.parametrize(
    ("value", "stops"), [(3, True), (0.5, True), ("3 epochs", True), ("3", False), (True, False), (None, False)]
)
def test_a_stop_is_a_number_or_epochs(value, stops):
    assert is_stop(value) is stops
