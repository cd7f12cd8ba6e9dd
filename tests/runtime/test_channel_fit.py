"""Least squares of each channel from moments are those of numpy's solver on the rows."""

import numpy as np
import pytest

from liar_opt.runtime.channel_fit import ChannelMoments


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """u and y [70, 5]: scaled, shifted and noisy; channel 3 of u is constant, channel 4 is zero."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(70, 5)) * [1.0, 3.0, 0.2, 0.0, 0.0] + [0.0, 2.0, -5.0, 1.5, 0.0]
    y = u * [0.5, 1.2, -2.0, 1.0, 1.0] + [1.0, -1.0, 0.3, 0.7, 2.0] + 0.1 * rng.normal(size=u.shape)
    return u.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize(("scale", "shift"), [(True, True), (True, False), (False, True)])
def test_it_is_the_least_squares_solution(scale: bool, shift: bool) -> None:
    u, y = rows()
    moments = ChannelMoments(5)
    for part in (slice(0, 30), slice(30, 70)):
        moments.add(u[part], y[part])
    alpha, beta = moments.fit(scale, shift)
    for channel in range(3):
        columns = [u[:, channel]] * scale + [np.ones(70)] * shift
        target = y[:, channel] - (0.0 if scale else u[:, channel])
        wanted = list(np.linalg.lstsq(np.stack(columns, 1).astype(np.float64), target, rcond=None)[0])
        assert [alpha[channel]] * scale + [beta[channel]] * shift == pytest.approx(wanted, rel=1e-6)
    assert alpha[4] == 1.0 and np.isfinite([*alpha, *beta]).all()
    if shift:
        assert alpha[3] == 1.0 and beta[3] == pytest.approx((y - u)[:, 3].mean(), abs=1e-6)
    error = np.square(y.astype(np.float64) - alpha * u - beta).sum()
    assert moments.error(alpha, beta) == pytest.approx(error, rel=1e-9)
    assert moments.error() == pytest.approx(np.square(y.astype(np.float64) - u).sum(), rel=1e-9)
