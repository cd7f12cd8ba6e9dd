"""The processes of one run (``torchrun --nproc-per-node N -m liar_opt ...``), each a *rank*; one process is rank 0 of one.

All ranks go through the same passes. Each runs the batches that are its own, sums are added up over all, and the weights of
what was solved by one, its *owner*, are handed to the others. What is decided by a clock, by free memory or by a file is
decided by rank 0 alone, so that all do the same. An error of one is raised by all. Rank 0 alone writes and prints.

The command joins the processes (`join`), nobody else: a program of the user's own may use torch.distributed for itself.
"""

import contextlib
import os
import pickle
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from numpy.typing import NDArray

from liar_opt.runtime.errors import InternalError, LiarOptError, OptionError
from liar_opt.runtime.extras import require

TIMEOUT = 3600.0
"""Seconds that a process waits for another: the slowest thing that one does alone. That one has died is seen at once."""
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment, and who starts processes otherwise must."""
FAILED = "liar-opt/failed"
T = TypeVar("T")
AnyArray = NDArray[Any]


class RankLost(LiarOptError):
    """Another process of this run is gone (exit code 2)."""


class Elsewhere(Exception):
    """The first process has the result; the others are done."""


class Ranks:
    """One process: nothing is shared out.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        waited: seconds that were spent on the others.
        room: bytes that each may use where nobody says it (`memory.share_out`); None for what the machine has.
    """

    rank = 0
    size = 1
    waited = 0.0
    room: int | None = None

    def own(self, count: int) -> range:
        """Returns which of so many items, batches say, are this process's."""
        return range(self.rank, count, self.size)

    def once(self, function: Callable[[], T]) -> T:
        """Runs it in the first process; all get what it returns, or raises."""
        return function()

    def agreed(self, value: T) -> T:
        """Returns the first process's value."""
        return self.once(lambda: value)

    def kept(self, function: Callable[[], T]) -> T:
        """Runs it in the first process, where what it returns stays.

        Raises:
            Elsewhere: in the other processes, when it is done.
        """
        return function()

    def together(self, function: Callable[[], T]) -> T:
        """Runs it in every process; what one raises all do."""
        return function()

    def from_owner(self, owner: int, value: T) -> T:
        """Returns the value that one process has."""
        del owner
        return value

    def gathered(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank."""
        return [value]

    def added(self, array: AnyArray, owner: int) -> None:
        """Has an array become the sum of those of all processes, in place, in one of them."""

    def least(self, value: int) -> int:
        """Returns the smallest of a number that each has."""
        return min(self.gathered(value))

    def most(self, value: int) -> int:
        """Returns the largest of a number that each has."""
        return max(self.gathered(value))

    def require_same(self, what: Mapping[str, Any]) -> None:
        """Checks that all processes have the same.

        Args:
            what: plain data, by what it is called in the message.

        Raises:
            OptionError: one has other; the message names what and who.
        """
        found = self.gathered(dict(what))
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other[name] != value:
                    raise OptionError(
                        f"process {rank} has another {name} than process 0 ({_shown(other[name])}, not {_shown(value)}); "
                        "start all alike"
                    )

    def failed(self, code: int) -> int | None:
        """Notes that this process ends in an error; returns the exit code of one that failed before it, if one did."""
        del code
        return None

    def gone(self) -> list[int]:
        """Returns which processes of this machine are not there any more."""
        return []

    def leave(self) -> None:
        """Ends what was begun."""


class Processes(Ranks):
    """One of several processes, in touch by torch.distributed (gloo).

    Raises:
        OptionError: the others are not reached.
    """

    def __init__(self) -> None:
        import datetime

        import torch.distributed

        self._torch, self._distributed = torch, torch.distributed
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            self._distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
        except (RuntimeError, ValueError) as err:
            raise OptionError(
                f"the other processes of this run are not reached ({_line(err)}); MASTER_ADDR and MASTER_PORT say where"
            ) from err
        self._store: Any = torch.distributed.distributed_c10d._get_default_store()
        self._peers: list[tuple[str, int]] = [("", 0)] * self.size
        self._peers = self.gathered((platform.node(), os.getpid()))

    def once(self, function: Callable[[], T]) -> T:
        """Runs it in the first process; all get what it returns, or raises."""
        return self._by(0, function)

    def kept(self, function: Callable[[], T]) -> T:
        """Runs it in the first process, where what it returns stays."""
        kept: list[T] = []
        self.once(lambda: kept.append(function()))
        if not kept:
            raise Elsewhere
        return kept[0]

    def together(self, function: Callable[[], T]) -> T:
        """Runs it in every process; what one raises all do."""
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(function())
        except RankLost:
            raise
        except Exception as err:
            error = err
        errors = self.gathered(None if error is None else self._sendable(error))
        first = next(((rank, one) for rank, one in enumerate(errors) if one is not None), None)
        if first is not None:
            self._raise(*first, error)
        return result[0]

    def from_owner(self, owner: int, value: T) -> T:
        """Returns the value that one process has."""
        return self._by(owner, lambda: value)

    def gathered(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank."""
        found: list[Any] = [None] * self.size
        with self._in_touch():
            self._distributed.all_gather_object(found, value)
        return found

    def added(self, array: AnyArray, owner: int) -> None:
        """Has an array become the sum of those of all processes, in place, in one of them."""
        assert array.flags.c_contiguous
        with self._in_touch():
            self._distributed.reduce(self._torch.from_numpy(array.reshape(-1)), owner)

    def failed(self, code: int) -> int | None:
        """Notes that this process ends in an error; returns the exit code of one that failed before it, if one did."""
        own = f"{self.rank} {code}"
        try:
            found = self._store.compare_set(FAILED, "", own).decode()
        except RuntimeError:  # who has the store is gone
            return None
        return None if found == own else int(found.split()[1])

    def leave(self) -> None:
        """Ends what was begun."""
        with contextlib.suppress(RuntimeError):
            self._distributed.destroy_process_group()

    def _by(self, owner: int, function: Callable[[], T]) -> T:
        sent: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == owner:
            try:
                with self._alone():
                    sent[0] = function()
            except RankLost:
                raise
            except Exception as err:
                error = err
                sent[1] = self._sendable(err)
        own: T = sent[0]
        with self._in_touch():
            self._distributed.broadcast_object_list(sent, owner)
        if sent[1] is not None:
            self._raise(owner, sent[1], error)
        found: T = sent[0]
        return own if self.rank == owner else found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Has what runs within be one process's work: the others wait for what it comes to."""
        global _current
        before, _current = _current, Ranks()
        _current.room = self.room
        try:
            yield
        finally:
            _current = before

    def _sendable(self, error: Exception) -> Exception:
        """Returns an error as it can be sent; a bug comes with its traceback."""
        if not isinstance(error, LiarOptError):
            error.add_note(f"in process {self.rank}:\n{''.join(traceback.format_exception(error))}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return InternalError(f"{type(error).__name__}: {error}")
        return error

    def _raise(self, rank: int, error: Exception, own: Exception | None) -> NoReturn:
        if rank == self.rank:
            assert own is not None
            raise own
        error.__dict__["from_rank"] = rank
        raise error

    @contextlib.contextmanager
    def _in_touch(self) -> Iterator[None]:
        """Says in one sentence that another process is gone."""
        began = time.perf_counter()
        try:
            yield
        except RuntimeError as err:
            gone = ", ".join(map(str, self.gone()))
            who = f"process {gone} of this run" if gone else "another process of this run"
            raise RankLost(f"{who} ended ({_line(err)})") from err
        finally:
            self.waited += time.perf_counter() - began

    def gone(self) -> list[int]:
        """Returns which processes of this machine are not there any more."""
        here = platform.node()
        for _ in range(10):
            found = [r for r, (node, pid) in enumerate(self._peers) if node == here and r != self.rank and _dead(pid)]
            if found:
                return found
            time.sleep(0.05)
        return []


_current = Ranks()


def current() -> Ranks:
    """Returns the processes of this run."""
    return _current


def asked() -> bool:
    """Returns whether the environment says that this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ


def join() -> Ranks:
    """Joins the processes that the environment names; each takes one of the machine's GPUs.

    Raises:
        OptionError: torch is missing, or the environment is incomplete, or the others are not reached.
    """
    global _current
    if not asked():
        return _current
    require("a run of several processes", "torch")
    missing = [name for name in NAMES if name not in os.environ]
    if missing:
        raise OptionError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, but {', '.join(missing)} is not in the "
            "environment; start them with torchrun"
        )
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    devices = _devices()
    if local is not None and devices:  # before anything has looked at them
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(local) % len(devices)]
    _current = Processes()
    return _current


def leave() -> None:
    """Is one process again."""
    global _current
    _current.leave()
    _current = Ranks()


def on_this_machine() -> int:
    """Returns how many processes of this run share the machine's memory."""
    if _current.size == 1:
        return 1
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))))


def threads() -> int | None:
    """Returns how many threads each of several processes may have; None where one has the machine for itself."""
    if _current.size == 1:
        return None
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, (os.cpu_count() or 1) // on_this_machine())


def _devices() -> Sequence[str]:
    """Returns the GPUs that may be used, without loading what uses them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    try:
        return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").iterdir())]
    except OSError:
        return ()


def _dead(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return Path("/proc/self").exists()
    return state in "ZX"


def _shown(value: Any) -> str:
    text = "none" if value is None else f"{value}"
    return text if len(text) <= 60 else f"{text[:24]}..."


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]
