"""numpy on the host and torch, here on the CPU, solve alike; with CUDA the same tests run there."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from liar_opt.runtime import arrays as module
from liar_opt.runtime import solve
from liar_opt.runtime.arrays import HOST, Arrays, TorchArrays, arrays_for, arrays_of, solver, solving_on
from liar_opt.runtime.errors import InternalError, OptionError
from liar_opt.runtime.local_search import swap_blocks
from liar_opt.runtime.moments import FoldName, Moments
from liar_opt.runtime.subspaces import Basis, logit_forms, turn_values

FOLDS: tuple[FoldName, ...] = ("training", "held_back", "all")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[TorchArrays]:
    """torch as the solver, in float64."""
    with solving_on(TorchArrays(request.param, single=False)) as arrays:
        assert isinstance(arrays, TorchArrays)
        yield arrays


def rows_of(n: int, rows: int = 600, alike: int = 0, seed: int = 0) -> np.ndarray:
    """Activations; the last ``alike`` channels are those before them once more."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n)) @ (np.eye(n) + rng.standard_normal((n, n)) / np.sqrt(n)) + rng.standard_normal(n)
    if alike:
        x[:, n - alike :] = x[:, n - 2 * alike : n - alike]
    return np.asarray(x)


def both(n: int, m: int, device: Arrays, alike: int = 0, cross: bool = False) -> list[tuple[Moments, np.ndarray]]:
    """The same moments on the host and on the device, and a weight whose rows of alike channels are alike."""
    x = rows_of(n, alike=alike)
    weight = np.random.default_rng(1).standard_normal((n, m))
    if alike:
        weight[n - alike :] = weight[n - 2 * alike : n - alike]
    result = []
    for arrays in (HOST, device):
        moments = Moments(n, arrays)
        for i, part in enumerate(np.array_split(x, 10)):
            rows = [part[:, :5].T @ part, part[:, 5:].T @ part[:, 5:]]
            moments.add_block_rows(len(part), part.sum(axis=0), rows, [0, 5, n], i == 4)
            if cross:
                y = np.tanh(part @ weight)
                moments.add_cross(len(part), part.T @ y, y.sum(axis=0), float(np.square(y).sum()), i == 4)
        result.append((moments, weight))
    return result


def same(first: Any, second: Any, rel: float = 1e-9) -> None:
    one, two = (arrays_of(a).host(a) if not isinstance(a, float) else np.asarray(a) for a in (first, second))
    np.testing.assert_allclose(one, two, rtol=rel, atol=rel * float(np.abs(one).max(initial=0.0)))


def test_moments_are_the_same_and_stay(device: TorchArrays) -> None:
    (host, _), (there, _) = both(24, 7, device, cross=True)
    for fold in FOLDS:
        a, b = host.statistics(fold), there.statistics(fold)
        assert isinstance(b.covariance, torch.Tensor) and b.covariance.device == device.device
        same(a.covariance, b.covariance)
        same(a.mean, b.mean)
        same(a.uncentred, b.uncentred)
        same(a.mean_square, b.mean_square)
        c, d = host.cross_statistics(fold), there.cross_statistics(fold)
        same(c.covariance, d.covariance)
        assert d.target_variance == pytest.approx(c.target_variance)
    few = np.array([1, 4, 20])
    same(host.part(few).statistics().covariance, there.part(few).statistics().covariance)
    same(host.merge(host).mean, there.merge(there).mean)
    same(host.covariance, there.on_host().covariance)
    by = np.linspace(-1.0, 1.0, 7)
    host.shift_target(by)
    there.shift_target(by)
    same(host.cross_statistics().covariance, there.cross_statistics().covariance)
    totals: list[tuple[int, ...]] = []

    def doubled(array: np.ndarray) -> None:
        totals.append(array.shape)
        array *= 2.0

    there.add_up(doubled, there.crosses)
    assert (24, 24) in totals and there.count == 2 * host.count
    same(host.covariance, there.covariance)
    with pytest.raises(OptionError, match="NaN or Inf"):
        there.add(1, np.full(24, np.nan), np.eye(24))
    with pytest.raises(InternalError, match=r"were given \(3,\)"):
        there.add(1, np.zeros(3), np.eye(3))


@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("n, m", [(64, 24), (64, 150), (256, 300)])
def test_repairs_and_errors_are_the_same(device: TorchArrays, n: int, m: int, depth: int) -> None:
    (host, weight), (there, _) = both(n, m, device)
    blocks = np.arange(n) // depth
    found = []
    for moments in (host, there):
        s, folds = moments.statistics(), (moments.statistics("training"), moments.statistics("held_back"))
        selection = solve.select_greedy([solve.Problem(s.covariance, weight, blocks)], blocks.max() // 2, 1e-3)
        kept = np.flatnonzero(np.isin(blocks, selection.kept_blocks))
        removed = np.setdiff1d(np.arange(n), kept)
        choice = solve.choose_ridge(*folds, weight, kept, removed)
        fits = [
            solve.repair_weight(s.covariance, s.mean, weight, kept, removed, c)
            for c in (choice, *(solve.RidgeChoice(kind, 1e-3) for kind in ("repair", "bias", "none")))
        ]
        errors = [choice.error, choice.training_error, *(fit.explained for fit in fits)]
        rest = solve.unexplained(s.covariance, np.arange(n // 2), np.arange(n // 2, n))
        found.append((selection, choice, fits, errors, rest))
    (a, choice_a, fits_a, errors_a, rest_a), (b, choice_b, fits_b, errors_b, rest_b) = found
    assert all(isinstance(f.weight, torch.Tensor) and isinstance(f.on_host().weight, np.ndarray) for f in fits_b)
    assert a.removed_blocks.tolist() == b.removed_blocks.tolist() and a.kept_blocks.tolist() == b.kept_blocks.tolist()
    assert (choice_a.kind, choice_a.ridge) == (choice_b.kind, choice_b.ridge) and errors_a == pytest.approx(errors_b)
    for one, two in zip(fits_a, fits_b, strict=True):
        same(one.weight, two.weight, 1e-8)
        same(one.bias, two.bias, 1e-8)
    same(a.errors, b.errors, 1e-8)
    same(rest_a, rest_b, 1e-8)


def test_selection_of_a_wide_dimension_in_float32(device: TorchArrays) -> None:
    (host, weight), (there, _) = both(1100, 40, device)
    found = [solve.select_greedy([solve.Problem(m.covariance, weight, np.arange(1100))], 550, 1e-3) for m in (host, there)]
    assert len(np.intersect1d(found[0].kept_blocks, found[1].kept_blocks)) >= 548
    same(found[0].errors, found[1].errors, 1e-4)


@pytest.mark.parametrize("n, alike", [(60, 20), (60, 30), (400, 190)])
def test_of_blocks_that_are_alike_the_first_go(device: TorchArrays, n: int, alike: int) -> None:
    (host, weight), (there, _) = both(n, 16, device, alike=alike)
    found = [
        solve.select_greedy([solve.Problem(m.covariance, weight, np.arange(n))], n - alike // 2, 1e-3).removed_blocks
        for m in (host, there)
    ]
    assert found[0].tolist() == found[1].tolist()


def test_ties_are_broken_by_the_place() -> None:
    cost = np.array([3.0, 2.0 + 1e-12, 2.0, 1.0, np.inf, 1.0 - 1e-12, 2.0])
    assert solve.cheapest(cost, 1, 1e-9).tolist() == [3]
    assert solve.cheapest(cost, 3, 1e-9).tolist() == [3, 5, 1]
    assert solve.cheapest(cost, 6, 1e-9).tolist() == [3, 5, 1, 2, 6, 0]
    assert solve.cheapest(cost, 3, 0.0).tolist() == [5, 3, 2]
    assert solve.cheapest(-cost[:4], 2, 1e-9).tolist() == [0, 1]


def test_blocks_of_several_sizes_and_problems(device: TorchArrays) -> None:
    blocks = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6])
    found = []
    for arrays in (HOST, device):
        problems = []
        for seed in (0, 1):
            moments, x = Moments(12, arrays), rows_of(12, 300, seed=seed)
            moments.add(len(x), x.sum(axis=0), x.T @ x)
            weight = np.random.default_rng(seed).standard_normal((12, 5))
            problems.append(solve.Problem(moments.covariance, weight, blocks, 1.0 + seed))
        found.append((solve.select_greedy(problems, 2, 1e-3), swap_blocks(problems, np.array([0, 1, 2]), 1e-3)))
    (a, swapped_a), (b, swapped_b) = found
    assert a.removed_blocks.tolist() == b.removed_blocks.tolist()
    same(a.errors, b.errors)
    assert swapped_a.tolist() == swapped_b.tolist()


def test_swaps_are_the_same(device: TorchArrays) -> None:
    (host, weight), (there, _) = both(48, 64, device, alike=8)
    start = np.arange(6)
    found = [
        swap_blocks([solve.Problem(m.covariance, weight, np.arange(48) // 4)], start, 1e-3, trials=40)
        for m in (host, there)
    ]
    assert found[0].tolist() == found[1].tolist() != start.tolist()


def test_dense_targets_are_the_same(device: TorchArrays) -> None:
    (host, weight), (there, _) = both(40, 12, device, cross=True)
    kept = np.arange(0, 40, 2)
    found = []
    for moments in (host, there):
        folds = [(moments.statistics(f), moments.cross_statistics(f)) for f in FOLDS]
        ridge = solve.choose_dense_ridge(folds[0], folds[1], kept, weight[kept])
        fit = solve.fit_dense_target(*folds[2], kept, weight[kept], ridge)
        found.append((ridge, solve.dense_target_error(*folds[1], kept, fit.weight, fit.bias), fit))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1])
    same(found[0][2].weight, found[1][2].weight)
    same(found[0][2].bias, found[1][2].bias)


def test_rotations_are_the_same(device: TorchArrays) -> None:
    x, y = rows_of(16), rows_of(16, seed=3)
    c, gram = x.T @ x / len(x), y.T @ y / len(y)
    there = device.real(c), device.real(gram)
    one, two = turn_values(c, gram, 6), turn_values(*there, 6)
    # A direction may have the other sign: what is compared is the subspace, and what is kept of it.
    for a, b in ((one[:, :6], device.host(two)[:, :6]), (one[:, 6:], device.host(two)[:, 6:])):
        same(a @ a.T, b @ b.T, 1e-8)
    (u, v, s), (u2, v2, s2) = logit_forms(c, gram, 6), logit_forms(*there, 6)
    same(u @ v.T, u2 @ v2.T, 1e-8)
    same(s, s2)
    assert turn_values(device.zeros((4, 4)), device.zeros((4, 4)), 2).tolist() == np.eye(4).tolist()
    basis = Basis(((np.arange(2, 18), one),))
    z = rows_of(20, 50)
    for does in (basis.rows, lambda a: basis.columns(a.T), lambda a: basis.weight(a.T)):
        same(does(z), does(device.real(z)))


def test_an_almost_singular_matrix_raises_the_ridge_alike(device: TorchArrays) -> None:
    (host, weight), (there, _) = both(60, 16, device, alike=30)
    kept, removed = np.arange(10, 60), np.arange(10)
    choice = solve.RidgeChoice("repair", 0.0)
    one, two = (solve.repair_weight(m.covariance, m.mean, weight, kept, removed, choice) for m in (host, there))
    assert one.raised and two.raised and one.ridge_used == two.ridge_used
    same(one.weight, two.weight, 1e-3)


# -- float32, refined ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", DEVICES)
def test_float32_is_refined(where: str) -> None:
    single = TorchArrays(where, single=True)
    with solving_on(single):
        (host, weight), (there, _) = both(200, 30, single)
        kept, removed = np.arange(0, 200, 2), np.arange(1, 200, 2)
        choice = solve.RidgeChoice("repair", 1e-3)
        exact = solve.repair_weight(host.covariance, host.mean, weight, kept, removed, choice)
        fit = solve.repair_weight(there.covariance, there.mean, weight, kept, removed, choice)
        low = there.covariance.float()[::2, ::2]
        low.diagonal().add_(1e-3 * float(low.diagonal().mean()))
        target = (there.covariance[::2, 1::2] @ device_weight(single, weight[removed])).float()
        plain = torch.cholesky_solve(target, torch.linalg.cholesky(low)).double()
    known = single.precision
    assert (known.factored, known.again) == (1, 0) and 0.0 < known.worst <= module.ACCURACY
    same(exact.weight, fit.weight, 1e-8)
    wanted = single.real(exact.weight - weight[kept])
    assert float((plain - wanted).norm() / wanted.norm()) > 1e-7  # without refinement it is not that near
    assert single.described()["precision"] == "float32, refined" and single.described()["factored"] == 1


def device_weight(arrays: Arrays, weight: np.ndarray) -> Any:
    return arrays.real(weight)


def test_what_float32_cannot_do_is_done_in_float64() -> None:
    single = TorchArrays("cpu", single=True)
    scales = np.geomspace(1.0, 1e-4, 80)
    x = rows_of(80) * scales
    with solving_on(single):
        moments = Moments(80)
        moments.add(len(x), x.sum(axis=0), x.T @ x)
        covariance = moments.covariance
        kept, removed, choice = np.arange(60), np.arange(60, 80), solve.RidgeChoice("repair", 1e-9)
        weight = np.eye(80)[:, 60:]  # the new weights are Q then
        fit = solve.repair_weight(covariance, moments.mean, weight, kept, removed, choice)
    exact = solve.repair_weight(single.host(covariance), single.host(moments.mean), weight, kept, removed, choice)
    assert single.precision.again == 1 and fit.ridge_used == exact.ridge_used and not fit.raised
    same(exact.weight, fit.weight, 1e-6)


def test_greedy_selection_with_float32_factors() -> None:
    single = TorchArrays("cpu", single=True)
    (host, weight), (there, _) = both(120, 40, single)
    found = []
    with solving_on(single):
        for moments in (host, there):
            problem = solve.Problem(moments.covariance, weight, np.arange(120) // 2)
            found.append(solve.select_greedy([problem], 20, 1e-3))
    assert found[0].removed_blocks.tolist() == found[1].removed_blocks.tolist()
    same(found[0].errors, found[1].errors, 1e-6)


# -- which one ------------------------------------------------------------------------------------------------------------


def test_the_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_of_torch", lambda: None)
    assert arrays_for("auto") is HOST and arrays_for("host") is HOST
    with pytest.raises(OptionError, match=r"solver 'device' needs a CUDA device.*use solver 'host'"):
        arrays_for("device")
    with pytest.raises(OptionError, match="solver 'gpu' is unknown; choose one of auto, host, device"):
        arrays_for("gpu")
    monkeypatch.setattr(module, "device_of_torch", lambda: "cpu")
    assert isinstance(arrays_for("auto"), TorchArrays) and arrays_for("host") is HOST
    assert HOST.described() == {"where": "host", "precision": "float64"}


def test_moments_are_where_the_run_solves() -> None:
    there = TorchArrays("cpu")
    with solving_on(there):
        assert solver() is there and Moments(3).arrays is there and Moments(3, HOST).arrays is HOST
        assert arrays_of(torch.zeros(1)) is there
    assert solver() is HOST and Moments(3).arrays is HOST
    assert arrays_of(torch.zeros(1)) is not there  # of another run


def test_what_comes_in() -> None:
    from ml_dtypes import bfloat16

    there = TorchArrays("cpu")
    numbers = np.array([[1.0, -2.5], [0.125, 3.0]], np.float32)
    read_only = numbers.copy()
    read_only.flags.writeable = False
    for given in (numbers, numbers.astype(bfloat16), read_only, torch.from_numpy(numbers), numbers.astype(np.float16)):
        assert there.real(given).tolist() == numbers.tolist() and there.real(given).dtype == torch.float64
    assert there.real(numbers[::-1]).tolist() == numbers[::-1].tolist()
    assert HOST.real(torch.from_numpy(numbers)).tolist() == numbers.tolist()

    class Shared:
        """What ONNX Runtime's device values have."""

        def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
            return torch.from_numpy(numbers).__dlpack__(*args, **kwargs)

        def __dlpack_device__(self) -> Any:
            return torch.from_numpy(numbers).__dlpack_device__()

    taken = there.there(Shared())
    assert taken.tolist() == numbers.tolist() and taken.data_ptr() == numbers.ctypes.data  # without a copy
