"""Measures against values worked by hand, and the table's own manners."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgerun import compare
from edgerun.errors import ParityError


def test_relative_l2_by_hand() -> None:
    assert compare.relative_l2([3.0, 4.0], [0.0, 5.0]) == pytest.approx(math.sqrt(9 + 1) / 5)


def test_relative_l2_of_zero_reference() -> None:
    assert compare.relative_l2([0.0], [0.0]) == 0.0
    assert compare.relative_l2([1.0], [0.0]) == math.inf


def test_measures_are_taken_in_float64() -> None:
    reference = np.float32([1.0, 1e-4])
    measured = np.float32([1.0, 2e-4])  # float32 squares would lose the difference beside 1.0 squared
    expected = 1e-4 / math.sqrt(1 + 1e-8)
    assert compare.relative_l2(measured, reference) == pytest.approx(expected, rel=1e-6)


def test_nmse_by_hand() -> None:
    assert compare.nmse([1.0, 2.0, 2.0], [1.0, 1.0, 2.0]) == pytest.approx(1 / 6)


def test_max_abs_by_hand() -> None:
    assert compare.max_abs([1.0, -2.0], [0.5, 1.0]) == 3.0
    assert compare.max_abs([], []) == 0.0


def test_psnr_by_hand() -> None:
    # mean squared error 25.5^2 = (255 / 10)^2, so the ratio is 100: 20 dB
    assert compare.psnr_db([25.5, 0.0], [0.0, 25.5], peak=255.0) == pytest.approx(20.0)
    assert compare.psnr_db([1.0], [1.0], peak=1.0) == math.inf


def test_kl_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = ln(2)/2 + ln(2/3)/2
    value = compare.kl_divergence([[0.0, math.log(3)]], [[7.0, 7.0]])
    assert value.shape == (1,)
    assert value[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_kl_ignores_a_common_offset_and_survives_large_logits() -> None:
    rows = np.array([[1e4, 1e4 - 1.0, -1e4]])
    assert compare.kl_divergence(rows + 5.0, rows)[0] == pytest.approx(0.0, abs=1e-12)


def test_top1_by_hand() -> None:
    measured = [[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]]
    reference = [[0.0, 2.0], [0.0, 1.0], [1.0, 2.0]]
    assert compare.top1_agreement(measured, reference) == pytest.approx(2 / 3)


def test_top2_margin_by_hand() -> None:
    assert compare.top2_margin([[3.0, -1.0, 2.5], [0.0, 0.0, -5.0]]).tolist() == [0.5, 0.0]


def test_first_divergence_gives_step_tokens_and_the_references_margin() -> None:
    logits = np.array([[0.0, 5.0, 1.0], [2.0, 1.75, 0.0], [0.0, 0.0, 9.0]])
    found = compare.first_divergence([1, 1, 2], [1, 0, 2], logits)
    assert found == compare.Divergence(step=1, measured_token=1, reference_token=0, margin=0.25)


def test_first_divergence_of_equal_and_of_shorter_runs_is_none() -> None:
    logits = np.zeros((3, 2))
    assert compare.first_divergence([1, 0, 1], [1, 0, 1], logits) is None
    assert compare.first_divergence([1], [1, 0, 1], logits) is None


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ParityError, match=r"\(2,\).*\(1, 2\)"):
        compare.relative_l2([1.0, 2.0], [[1.0, 2.0]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ParityError, match="measured"):
        compare.max_abs([bad], [0.0])
    with pytest.raises(ParityError, match="reference"):
        compare.kl_divergence([[0.0, 1.0]], [[0.0, bad]])


def test_a_limit_refuses_what_is_not_a_number() -> None:
    assert not compare.TOLERANCES["logits_fp32"].allows(math.nan)
    assert not compare.TOLERANCES["sparse_top1"].allows(math.nan)


def test_least_limits_are_met_from_above() -> None:
    limit = compare.TOLERANCES["sparse_top1"]
    assert limit.allows(1.0) and not limit.allows(limit.value - 0.01)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        compare.TOLERANCES["logits_fp32"] = compare.Tolerance(1.0, "", "")  # type: ignore[index]


def test_every_limit_says_what_it_measures_and_why() -> None:
    for name, row in compare.TOLERANCES.items():
        assert row.measure and row.reason, name


def test_an_unknown_tolerance_names_those_there_are() -> None:
    with pytest.raises(ParityError, match="logits_fp32"):
        compare.tolerance("logits")
