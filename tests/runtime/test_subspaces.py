"""Closed forms against what they minimise: the error is the tail of the spectrum, and no other subspace does better."""

from __future__ import annotations

import numpy as np
import pytest

from liar_opt.runtime.moments import Statistics
from liar_opt.runtime.subspaces import Basis, copies, logit_forms, turn_values


def rows(width: int, seed: int, rank: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((200, rank or width)) @ rng.standard_normal((rank or width, width))


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_values_lose_the_tail_of_the_spectrum_and_others_lose_more(rank: int) -> None:
    z, rng = rows(7, 0), np.random.default_rng(1)
    weight = rng.standard_normal((7, 11))
    covariance, gram = z.T @ z / len(z), weight @ weight.T
    turn = turn_values(covariance, gram, rank)
    form = turn[:, :rank] @ np.linalg.inv(turn)[:rank]

    def lost(projection: np.ndarray) -> float:
        return float(np.square(z @ weight - z @ projection @ weight).sum() / len(z))

    spectrum = np.linalg.eigvalsh(weight.T @ covariance @ weight)[::-1]
    assert lost(form) == pytest.approx(spectrum[rank:].sum(), rel=1e-9)
    blocks = turn.T @ covariance @ turn
    assert np.abs(blocks[:rank, rank:]).max() < 1e-9 * np.abs(blocks).max()
    for seed in range(20):
        other = np.random.default_rng(seed).standard_normal((7, rank))
        best = other @ np.linalg.solve(other.T @ covariance @ other, other.T @ covariance)
        assert lost(best) > lost(form)


@pytest.mark.parametrize("rank", [2, 5])
def test_values_that_span_little_still_give_a_basis(rank: int) -> None:
    """3 directions of 6 carry anything: more may be asked for, and the basis stays one."""
    z = rows(6, 0, rank=3)
    turn = turn_values(z.T @ z, np.eye(6), rank)
    assert np.linalg.cond(turn) < 1e3
    form = turn[:, :rank] @ np.linalg.inv(turn)[:rank]
    assert (np.abs(z - z @ form).max() < 1e-9) == (rank >= 3)
    np.testing.assert_allclose(turn_values(np.zeros((4, 4)), np.eye(4), 2), np.eye(4))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_logits_lose_the_tail_of_the_spectrum(rank: int) -> None:
    q, k = rows(5, 0), rows(5, 1)
    first, second, spectrum = logit_forms(q.T @ q, k.T @ k, rank)
    difference = q @ k.T - q @ first @ second.T @ k.T
    assert np.square(difference).sum() == pytest.approx(spectrum[rank:].sum(), rel=1e-8, abs=1e-8 * spectrum.sum())
    if rank == 5:
        np.testing.assert_allclose(first @ second.T, np.eye(5), atol=1e-9)
    for seed in range(20):
        drawn = np.random.default_rng(seed).standard_normal((5, rank))
        fitted = np.linalg.pinv(q @ drawn) @ (q @ k.T)  # the best there is in its span
        assert np.square(q @ k.T - q @ drawn @ fitted).sum() >= np.square(difference).sum() * (1 - 1e-9)


def test_keys_that_query_heads_share_have_one_form() -> None:
    """The optimum over a form for each query head and one for their keys: that of the stacked logits."""
    q, k, rank = [rows(5, seed) for seed in range(3)], rows(5, 9), 2
    first, second, _ = logit_forms(sum(x.T @ x for x in q), k.T @ k, rank)
    stacked = np.concatenate(q) @ k.T
    values = np.linalg.svd(stacked, compute_uv=False)
    lost = np.square(stacked - np.concatenate(q) @ first @ second.T @ k.T).sum()
    assert lost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-8)


def test_dead_keys_leave_no_logits() -> None:
    first, second, _ = logit_forms(np.eye(3), np.zeros((3, 3)), 2)
    assert not first.any() and np.isfinite(second).all()


def test_a_basis_changes_nothing_that_is_computed() -> None:
    """Two heads of 3 channels, interleaved, and a position of no head."""
    owners = np.asarray([0, 3, 1, 4, -1, 2, 5])
    found = copies(owners, 3)
    assert [(number, places.tolist()) for number, places in found] == [(0, [0, 2, 5]), (1, [1, 3, 6])]
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((50, 7)), rng.standard_normal((7, 4))
    basis = Basis(tuple((places, rng.standard_normal((3, 3))) for _, places in found))
    np.testing.assert_allclose(basis.rows(x) @ basis.weight(weight), x @ weight, atol=1e-9)
    mean = x.mean(axis=0)
    turned = basis.statistics(Statistics(50, mean, (x - mean).T @ (x - mean) / 50))
    np.testing.assert_allclose(turned.covariance, np.cov(basis.rows(x).T, bias=True), atol=1e-9)
    np.testing.assert_allclose(turned.mean, basis.rows(x).mean(axis=0), atol=1e-9)
    kept, few = np.asarray([0, 3, 4]), rng.standard_normal((3, 4))
    np.testing.assert_allclose(x @ basis.back(kept, few), basis.rows(x)[:, kept] @ few, atol=1e-9)


def test_copies_of_a_set_are_told_apart() -> None:
    """Two query heads share one set of values; what is left of an axis may be in any order."""
    assert [p.tolist() for _, p in copies(np.asarray([0, 1, 0, 1]), 2)] == [[0, 1], [2, 3]]
    assert [p.tolist() for _, p in copies(np.asarray([0, 0, 1, 1]), 2)] == [[0, 2], [1, 3]]
