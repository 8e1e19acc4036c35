"""A comparison that cannot fail proves nothing."""

import pytest
import torch
from helpers import assert_close, assert_within_budget, dense_contrast, dense_row_lse, unit


def test_assert_close_fails_on_a_wrong_value():
    truth = torch.tensor([1.0, 2.0])
    assert_close(truth, truth, 0.0)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(truth + 1e-3, truth, 1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_assert_close_fails_on_values_that_are_not_finite_alike(wrong):
    truth = torch.tensor([1.0, -torch.inf])
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(torch.tensor([1.0, wrong]), truth, 1.0)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(torch.tensor([float("nan"), -torch.inf]), truth, 1.0)


def test_assert_close_fails_on_another_shape():
    with pytest.raises(AssertionError):
        assert_close(torch.zeros(2, 1), torch.zeros(2), 1.0)


def test_budget_fails_beyond_twice_the_plain_error():
    truth = torch.ones(4)
    assert_within_budget(truth + 1.9e-3, truth + 1e-3, truth, 0.0)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(truth + 2.2e-3, truth + 1e-3, truth, 0.0)


def test_dense_truths_agree_with_a_formula_by_hand():
    query, keys = unit(3, 4, seed=1), unit(5, 4, seed=2)
    by_hand = [
        torch.log(sum(torch.exp(2.0 * query[n] @ k) for m, k in enumerate(keys) if m != n + 1))
        for n in range(3)
    ]
    assert_close(dense_row_lse(query, keys, 2.0, exclude_offset=1), torch.stack(by_hand), 1e-14)
    one = torch.ones(1, dtype=torch.bool)
    alone = dense_contrast(query[:1], keys[:1], 0.5, torch.zeros(1), one, queue=keys[1:3])
    scores = torch.stack([query[0] @ keys[j] / 0.5 for j in range(3)])
    assert_close(alone, (scores.exp().sum().log() - scores[0]).reshape(1), 1e-14)
