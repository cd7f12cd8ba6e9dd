"""Work that another thread does meanwhile: loading a session or reading a file needs no interpreter."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def later(function: Callable[[], Result]) -> Future[Result]:
    """Calls a function in a thread of its own from now on; its result, or what it raises, is the future's."""
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        return executor.submit(function)
    finally:
        executor.shutdown(wait=False)
