"""Masks grown, smoothed and combined."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from otl.tools.shaping import combined, grown, smoothed

MASK = np.random.default_rng(0).random((40, 60)) > 0.97


@pytest.mark.parametrize("radius", [1, 2, 5, 13])
def test_white_reaches_every_pixel_that_is_near_enough(radius: int) -> None:
    expected = ndimage.distance_transform_edt(~MASK) <= radius
    np.testing.assert_array_equal(grown(MASK, radius), expected)


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_below_0_black_does(radius: int) -> None:
    mask = ~MASK
    np.testing.assert_array_equal(grown(mask, -radius), ndimage.distance_transform_edt(mask) > radius)


def test_the_edge_of_the_picture_takes_nothing_away() -> None:
    assert grown(np.ones((5, 7), bool), -3).all()


def test_without_white_nothing_grows() -> None:
    assert not grown(np.zeros((5, 7), bool), 9).any()


def test_grown_by_0_a_mask_is_itself() -> None:
    np.testing.assert_array_equal(grown(MASK, 0), MASK)


def test_a_smooth_edge_is_half_at_the_edge_and_as_wide_as_a_gaussian() -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    edge = smoothed(mask, 4.0)[32]
    expected = ndimage.gaussian_filter1d(mask[32].astype(float), 4.0, mode="nearest")
    assert np.abs(edge - expected).max() < 0.02  # Pillow's Gaussian is three boxes
    assert edge[31] + edge[32] == pytest.approx(1, abs=0.02)


def test_a_radius_of_0_leaves_edges_sharp() -> None:
    np.testing.assert_array_equal(smoothed(MASK, 0), MASK)


OLD, NEW = np.float32([[0, 0.5, 1, 1]]), np.float32([[1, 0.25, 0, 1]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("replace", [1, 0.25, 0, 1]),
        ("fill", [1, 0.25, 0, 1]),
        ("add", [1, 0.5, 1, 1]),
        ("subtract", [0, 0.5, 1, 0]),
        ("blend", [0.25, 0.4375, 0.75, 1]),
    ],
)
def test_masks_are_combined(mode: str, expected: list[float]) -> None:
    np.testing.assert_array_equal(combined(OLD, NEW, mode, 0.25), [expected])


@pytest.mark.parametrize("mode", ["add", "subtract"])
def test_the_same_mask_twice_changes_nothing_more(mode: str) -> None:
    once = combined(OLD, NEW, mode, 0)
    np.testing.assert_array_equal(combined(once, NEW, mode, 0), once)
