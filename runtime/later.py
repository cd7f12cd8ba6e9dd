"""Work that another thread does meanwhile: loading a session or reading a file needs no interpreter."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Later(Generic[Result]):
    """The result of a call that runs in a thread of its own from now on.

    Args:
        function: what to call; what it raises, :meth:`result` raises.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as err:
            self._error: BaseException = err

    def result(self) -> Result:
        """Waits for the call and returns what it returned."""
        self._thread.join()
        if hasattr(self, "_error"):
            raise self._error
        return self._result
