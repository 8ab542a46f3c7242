"""Layers of several weights at once, cut apart."""

import pytest
import torch

from otl.config import SettingsError
from otl.formats.deltas import delta
from otl.formats.stacked import apart
from otl.types import LohaLayer, LokrLayer, LoraLayer, OftLayer


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


STACKED = {  # of a weight [12, 8]
    "lora": LoraLayer(drawn(4, 8), drawn(12, 4), 3.0),
    "dora": LoraLayer(drawn(4, 8), drawn(12, 4), 3.0, magnitude=drawn(12).abs()),
    "loha": LohaLayer(drawn(12, 2), drawn(2, 8), drawn(12, 2), drawn(2, 8), 3.0),
    "lokr": LokrLayer(3.0, w1=drawn(6, 2), w2_a=drawn(2, 1), w2_b=drawn(1, 4)),
    "lokr_both": LokrLayer(3.0, w1_a=drawn(6, 2), w1_b=drawn(2, 2), w2_a=drawn(2, 2), w2_b=drawn(2, 4)),
    "oft": OftLayer(drawn(6, 2, 2)),
}


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_pieces_add_to_their_weights_what_the_whole_adds_to_all_of_them(kind, count):
    weight, names = drawn(12, 8), ["a", "b", "c"][:count]
    pieces = apart({"+".join(names): STACKED[kind]})
    assert list(pieces) == names
    together = torch.cat([delta(piece, rows) for piece, rows in zip(pieces.values(), weight.chunk(count))])
    torch.testing.assert_close(together, delta(STACKED[kind], weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", STACKED)
def test_the_pieces_share_no_memory(kind):
    pieces = apart({"a+b": STACKED[kind]})
    kept = delta(pieces["b"], drawn(6, 8)).clone()
    for value in vars(pieces["a"]).values():
        if isinstance(value, torch.Tensor):
            value.add_(1.0)
    torch.testing.assert_close(delta(pieces["b"], drawn(6, 8)), kept, rtol=0, atol=0)


def test_what_cannot_be_cut_and_what_is_adapted_twice_are_refused():
    with pytest.raises(SettingsError, match=r"a\+b\+c: w1 has 4 rows, which cannot be cut into 3 layers"):
        apart({"a+b+c": LokrLayer(3.0, w1=drawn(4, 2), w2=drawn(3, 4))})
    with pytest.raises(SettingsError, match="b: adapted twice"):
        apart({"a+b": STACKED["lora"], "b": STACKED["lora"]})
