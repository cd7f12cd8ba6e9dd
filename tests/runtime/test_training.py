"""The loop that trains a few tensors: it learns, keeps its best state and its time, and survives what is not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.training import Budget, KeptTraining, Schedule, divergence, train

SCHEDULE = Schedule(0.1)


def ticking(seconds: float = 1.0) -> Callable[[], float]:
    """A clock that goes on by so much each time it is read."""
    now = [0.0]

    def clock() -> float:
        now[0] += seconds
        return now[0]

    return clock


class Line:
    """y = w x + b on drawn points; two of six batches are held back."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn((6, 8), generator=generator)
        self.y = 3.0 * self.x - 1.0
        self.tensors = [torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)]

    def error(self, rows: slice | int) -> torch.Tensor:
        return (self.tensors[0] * self.x[rows] + self.tensors[1] - self.y[rows]).square().mean()

    def held(self) -> float:
        with torch.no_grad():
            return float(self.error(slice(4, 6)))


def test_it_learns_within_its_time() -> None:
    line, clock = Line(), ticking()
    budget = Budget(clock(), 600.0, clock)
    done = train(line.tensors, line.error, line.held, 4, budget, SCHEDULE, 0)
    assert done.after < 0.05 * done.before and 0 < done.best <= done.steps and done.stopped is None
    assert done.after == line.held()
    assert clock() < 620.0


def test_the_order_is_drawn_with_the_seed() -> None:
    def state(seed: int) -> list[float]:
        line, clock = Line(), ticking()
        train(line.tensors, line.error, line.held, 4, Budget(clock(), 200.0, clock), SCHEDULE, seed)
        return [t.item() for t in line.tensors]

    assert state(1) == state(1) != state(2)


def test_no_time_at_all_is_one_step() -> None:
    line, clock = Line(), ticking(1e6)
    done = train(line.tensors, line.error, line.held, 4, Budget(clock(), 1.0, clock), SCHEDULE, 0)
    assert done.steps == 1


def test_what_is_worse_on_held_back_batches_is_undone() -> None:
    """What is held back wants the opposite of what is trained for."""
    line, clock = Line(), ticking()
    line.y[4:] *= -1
    done = train(line.tensors, line.error, line.held, 4, Budget(clock(), 400.0, clock), SCHEDULE, 0)
    assert done.best == 0 and done.after == done.before and done.steps > 9
    assert [t.item() for t in line.tensors] == [0.0, 0.0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_last_good_state_is_kept_where_something_is_not_finite(where: str) -> None:
    line, clock, calls = Line(), ticking(), [0]

    def loss(batch: int) -> torch.Tensor:
        calls[0] += 1
        value = line.error(batch)
        if calls[0] < 60:
            return value
        # the root of zero is finite, and its slope is not
        return value / 0.0 if where == "loss" else value + (line.tensors[0] - line.tensors[0].detach()).abs().sqrt().sum()

    done = train(line.tensors, loss, line.held, 4, Budget(clock(), 1000.0, clock), SCHEDULE, 0)
    assert done.steps == 59 and done.stopped is not None and "not finite at step 60" in done.stopped
    assert 0 < done.best < 60 and done.after == line.held() < done.before


def test_a_start_that_is_not_finite_is_left_alone() -> None:
    line, clock = Line(), ticking()
    done = train(line.tensors, line.error, lambda: float("nan"), 4, Budget(clock(), 9.0, clock), SCHEDULE, 0)
    assert done.steps == 0 and done.stopped is not None and [t.item() for t in line.tensors] == [0.0, 0.0]


def test_the_rate_rises_and_falls() -> None:
    shares = (0.0, 0.05, 0.1, 0.55, 1.0)
    assert [SCHEDULE.at(s) for s in shares] == pytest.approx([0.005, 0.05, 0.1, 0.05, 0.005])


def test_the_divergence_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    found, dense = (torch.randn((5, 7), generator=generator) for _ in range(2))
    logs = [torch.log_softmax(v, -1) for v in (found, dense)]
    wanted = torch.nn.functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
    torch.testing.assert_close(divergence(found, dense), wanted)
    assert float(divergence(dense, dense + 2.0)) == pytest.approx(0.0, abs=1e-5)


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path) -> None:
    """The same steps as in one go, the seconds that were used count, and the best state is not lost."""

    def trained(file: KeptTraining | None, stop: int = 10**9) -> tuple[list[float], Any]:
        line, clock = Line(), ticking()
        budget = Budget(clock(), 600.0, clock, 0.0 if file is None else file.seconds)

        def progress(passed: int, total: int) -> None:
            if passed >= stop:
                raise KeyboardInterrupt

        done = train(line.tensors, line.error, line.held, 4, budget, SCHEDULE, 0, progress, file)
        return [t.item() for t in line.tensors], done

    path = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(KeptTraining(path), 300)
    left = KeptTraining(path)
    assert left.found is not None and 200 < left.seconds <= 300
    tensors, done = trained(left)
    whole, at_once = trained(None)
    assert done.before == at_once.before and done.after <= left.found["standing"]["best"]
    assert left.found["standing"]["step"] < done.steps <= at_once.steps + 2
    assert tensors == pytest.approx(whole, abs=0.02)
    tensors, again = trained(KeptTraining(path))  # of a run that was killed when it was done with this
    assert again.after <= done.after
    path.write_bytes(b"half")
    with pytest.raises(OptionError, match="of an earlier run is damaged; remove the folder"):
        trained(KeptTraining(path))
