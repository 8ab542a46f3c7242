"""Rows beside a vocabulary's table."""

import torch
from torch import nn

from otl.methods.rows import Rows, Span, median_norm, random_rows, statistics


def rows(table, spans, inputs):
    return Rows(table, spans, inputs=inputs, fixed={}, outputs={})


def test_new_ids_may_lie_inside_a_table_that_is_longer_than_the_vocabulary():
    """T5's has 32128 rows for 32100 words."""
    table = nn.Embedding(10, 4)
    new = torch.arange(8.0).reshape(2, 4)
    found = rows(table, {"x": Span(7, 2)}, {"x": new})(torch.tensor([[6, 7, 8, 9]]))
    assert torch.equal(found[0], torch.stack([table.weight[6], new[0], new[1], table.weight[9]]))


def test_new_ids_may_lie_behind_the_table():
    table = nn.Embedding(10, 4)
    first, second = torch.randn(2, 4), torch.randn(1, 4)
    found = rows(table, {"x": Span(10, 2), "y": Span(12, 1)}, {"x": first, "y": second})(torch.tensor([[12, 11, 3]]))
    assert torch.equal(found[0], torch.stack([second[0], first[1], table.weight[3]]))


def test_names_may_be_those_of_a_dicts_methods():
    module = rows(nn.Embedding(4, 2), {name: Span(4 + n, 1) for n, name in enumerate(("keys", "values", "training"))},
                  {name: torch.randn(1, 2) for name in ("keys", "values", "training")})  # fmt: skip
    assert len(list(module.inputs.parameters())) == 3
    assert module(torch.tensor([[4, 5, 6]])).shape == (1, 3, 2)


def test_the_table_gives_its_dtype_and_gets_no_gradient():
    table = nn.Embedding(4, 2, dtype=torch.bfloat16).requires_grad_(False)
    module = rows(table, {"x": Span(4, 1)}, {"x": torch.randn(1, 2)})
    found = module(torch.tensor([[1, 4]]))
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert module.trained("x").grad.dtype == torch.float32
    assert torch.equal(module.trained("x").grad, torch.ones(1, 2))
    assert table.weight.grad is None


def test_the_median_norm_is_that_of_the_middle_row():
    table = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 20.0]])
    assert median_norm(table) == 5.0


def test_norms_are_restored_row_by_row_and_rows_at_rest_are_left_alone():
    module = rows(nn.Embedding(4, 2), {"x": Span(4, 2)}, {"x": torch.tensor([[3.0, 4.0], [0.6, 0.8]])})
    module.norms = {"x": 1.0}
    module.keep_norms()
    torch.testing.assert_close(module.trained("x").norm(dim=1), torch.ones(2))
    torch.testing.assert_close(module.trained("x")[0].detach(), torch.tensor([0.6, 0.8]))
    before = module.trained("x").detach().clone()
    module.keep_norms()
    assert torch.equal(module.trained("x"), before)


def test_random_rows_are_like_the_vocabularys():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(500, 300, generator=generator) * 0.1 + torch.linspace(-1, 1, 300)
    mean, spread = statistics(table)
    torch.testing.assert_close(mean, table.mean(0))
    torch.testing.assert_close(spread, table.std(0))
    found = random_rows(table, 3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.norm(dim=1), torch.full((3,), median_norm(table)))
    assert torch.nn.functional.cosine_similarity(found, table.mean(0, keepdim=True)).min() > 0.95
    assert not torch.equal(found[0], found[1])
