"""What is no layer of an adapter is refused by its name, whatever a file has in its place."""

import pytest
import torch

from otl.config import SettingsError
from otl.formats.layers import complete
from otl.types import LohaLayer, LokrLayer, LoraLayer, OftLayer

LORA = {"down": torch.ones(2, 5), "up": torch.ones(3, 2)}
LOHA = {"w1_a": torch.ones(3, 2), "w1_b": torch.ones(2, 5), "w2_a": torch.ones(3, 2), "w2_b": torch.ones(2, 5)}
TUCKER = (
    LOHA | {"w1_a": torch.ones(2, 3), "w2_a": torch.ones(2, 3)} | dict.fromkeys(("t1", "t2"), torch.ones(2, 2, 3, 3))
)
LOKR = {"w1": torch.ones(2, 2), "w2_a": torch.ones(3, 2), "w2_b": torch.ones(2, 5)}


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (LoraLayer, LORA),
        (LoraLayer, {"down": torch.ones(2, 5, 3, 3), "up": torch.ones(3, 2, 1, 1)}),
        (LohaLayer, LOHA),
        (LohaLayer, TUCKER),
        (LokrLayer, LOKR),
        (LokrLayer, {"w1": torch.ones(2, 2), "w2": torch.ones(3, 5, 3, 3)}),
        (OftLayer, {"blocks": torch.ones(4, 2, 2)}),
    ],
)
def test_a_layer_in_each_of_its_forms(kind, layer):
    assert isinstance(complete("a", kind, dict(layer)), kind)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (LoraLayer, LORA | {"up": torch.ones(3, 4)}),
        (LoraLayer, LORA | {"up": torch.ones(6)}),
        (LoraLayer, LORA | {"up": torch.tensor(1.0)}),
        (LoraLayer, LORA | {"up": torch.ones(3, 2, 3, 3)}),
        (LoraLayer, {"down": torch.ones(0, 5), "up": torch.ones(3, 0)}),
        (LohaLayer, LOHA | {"w2_a": torch.ones(7, 2)}),
        (LohaLayer, LOHA | {"w2_b": torch.ones(2, 0)}),
        (LohaLayer, TUCKER | {"t2": torch.ones(2, 2, 1, 1)}),
        (LohaLayer, LOHA | {"t1": torch.ones(2, 2, 3, 3)}),
        (LokrLayer, LOKR | {"w2_b": torch.ones(4, 5)}),
        (LokrLayer, LOKR | {"w2": torch.ones(3, 5)}),
        (LokrLayer, LOKR | {"w1": torch.ones(2)}),
        (OftLayer, {"blocks": torch.ones(4, 2, 3)}),
    ],
)
def test_matrices_that_do_not_fit_each_other_are_refused(kind, layer):
    with pytest.raises(SettingsError, match=r"broken \w+: the matrices of unet\.a do not fit each other: .*\["):
        complete("unet.a", kind, dict(layer))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"up": torch.tensor([[1.0, torch.nan]] * 3)}, "a: up holds NaN or infinity"),
        ({"up": torch.full((3, 2), 1e300, dtype=torch.float64)}, "a: up holds NaN or infinity"),
        ({"up": torch.ones(3, 2, dtype=torch.int8)}, "a: up holds int8, not real numbers"),
        ({"up": torch.ones(3, 2, dtype=torch.complex64)}, "a: up holds complex64, not real numbers"),
        ({"alpha": torch.tensor(torch.nan)}, "the alpha of a is nan, not a finite number"),
        ({"alpha": torch.tensor(torch.inf)}, "the alpha of a is inf, not a finite number"),
        ({"alpha": torch.tensor(True)}, "the alpha of a is True, not a finite number"),
        ({"alpha": torch.ones(4)}, r"the alpha of a is of the shape \[4\], not a finite number"),
        ({"alpha": torch.zeros(())}, "the alpha of a is 0"),
        ({"magnitude": torch.tensor(1.0)}, r"a: dora_scale \(\) is one for each input"),
    ],
)
def test_what_is_no_number_is_refused(odd, message):
    with pytest.raises(SettingsError, match=message):
        complete("a", LoraLayer, LORA | odd)
