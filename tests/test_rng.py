"""Randomness as a function of its arguments."""

import torch

from otl import rng


def test_a_key_depends_on_every_part_and_on_their_order():
    keys = {rng.key(1, 2, "a"), rng.key(2, 1, "a"), rng.key(1, 2, "b"), rng.key(12, "a"), rng.key(1, "2", "a")}
    assert len(keys) == 5


def test_a_key_fits_an_int64_tensor():
    assert all(0 <= rng.key(i) < 2**63 for i in range(1000))


def test_rows_of_normals_depend_on_their_own_key_only():
    both = rng.normals(torch.tensor([3, 4]), (2, 5), "noise")
    assert torch.equal(both[1], rng.normals(torch.tensor([4]), (2, 5), "noise")[0])


def test_streams_are_independent():
    keys = torch.arange(2000)
    a = rng.normals(keys, (1,), "noise").flatten()
    b = rng.normals(keys, (1,), "offset").flatten()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.1


def test_uniforms_fill_the_interval():
    u = rng.uniforms(torch.arange(4000), "timestep")
    assert u.min() >= 0 and u.max() < 1
    assert torch.histc(u, 10, 0, 1).min() > 300  # 400 expected in each tenth


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rng.normals(torch.tensor([1]), (4,), "noise")
    rng.permutation(5, 1, 2)
    assert torch.equal(torch.rand(3), expected)
