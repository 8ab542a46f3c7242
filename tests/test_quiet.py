"""What the libraries say is said once."""

import logging

import pytest

from otl.quiet import undouble_lightning


@pytest.mark.parametrize("name", ["lightning", "lightning.pytorch"])
def test_the_handler_that_lightning_adds_when_it_is_imported_goes(name):
    """Hydra's, at the root, says the line already."""
    logging.getLogger(name).addHandler(logging.StreamHandler())
    undouble_lightning()
    assert logging.getLogger(name).handlers == []
