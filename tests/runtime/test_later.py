"""Work in a thread of its own: its result, or what it raised."""

import threading

import pytest

from liar_opt.runtime.later import later


def test_the_call_runs_in_another_thread() -> None:
    assert later(threading.get_ident).result() != threading.get_ident()


def test_what_it_raises_is_raised_where_the_result_is_asked_for() -> None:
    def fails() -> int:
        raise ValueError("no")

    failed = later(fails)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            failed.result()
