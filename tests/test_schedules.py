"""Learning rate factors against their formulas."""

import pytest

from otl import schedules


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (1, 0.99), (25, 0.75), (99, 0.01), (100, 0), (110, 0)])
def test_linear_goes_straight_to_the_end_and_stays(step, expected):
    assert schedules.linear(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (1, 0.99975328), (25, 0.85355339), (75, 0.14644661), (110, 0)])
def test_cosine_does_not_rise_again_after_the_end(step, expected):
    assert schedules.cosine(step, 100) == pytest.approx(expected, abs=1e-8)


def test_a_warm_up_of_ten_steps_reaches_one_at_the_tenth():
    assert [schedules.constant(step, 100, warmup=10) for step in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1, 1, 1]


def test_a_warm_up_below_one_is_a_share_of_the_run():
    assert schedules.constant(9, 200, warmup=0.1) == 0.5
    assert schedules.constant(19, 200, warmup=0.1) == 1


def test_the_first_step_is_not_without_effect():
    assert all(schedule(0, 100, warmup=50) > 0 for schedule in (schedules.constant, schedules.linear, schedules.cosine))


def test_the_end_factor_is_reached():
    assert schedules.cosine(100, 100, end=0.1) == pytest.approx(0.1)
    assert schedules.linear(100, 100, end=0.1) == pytest.approx(0.1)
