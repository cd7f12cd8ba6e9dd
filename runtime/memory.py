"""How much memory there is, how much may be used, and how much was.

Memory is counted as *anonymous* memory: what a program has made itself. Pages of mapped files are resident too, but the
system takes them back when it needs them.
"""

import ctypes
import re
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.ranks import current, on_this_machine

UNITS = {"": 1, **{f"{p}{b}": (1024 if b == "IB" else 1000) ** (i + 1) for i, p in enumerate("KMGT") for b in ("B", "IB")}}
LARGE_MODEL = 8
"""A model whose weights take more than this part of the limit is worked on where it lies; its copies go to disk."""
LARGE_STREAM = 4
"""Live tensors between segments go to disk from this part of the limit on."""


def parse_size(size: int | str) -> int:
    """Returns bytes for a number of them, or for a text such as "2GB" (powers of 1000) or "512 MiB" (of 1024).

    Raises:
        OptionError: it is neither, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?B?)\s*", str(size).upper())
    unit = found[2] + ("B" if found[2] and not found[2].endswith("B") else "") if found else ""
    if isinstance(size, bool) or not found or unit not in ("B", *UNITS) or float(found[1]) <= 0:
        raise OptionError(f"memory '{size}' is no size; give bytes, or a number with a unit, such as 2GB or 512MiB")
    return int(float(found[1]) * UNITS.get(unit, 1))


def show_size(size: float) -> str:
    """Returns a size that :func:`parse_size` reads, rounded up."""
    unit, name = next((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")) if size >= u or n == "KB")
    tenths = -int(-size * 10 // unit)
    return f"{tenths / 10:g}{name}"


def free_memory() -> int:
    """Returns the bytes that this process could still use: of the machine, or of its control group."""
    found: list[int] = []
    status = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in status:
        found.append(status["MemAvailable"])
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    if not found:
        import psutil

        found.append(psutil.virtual_memory().available)
    return max(min(found), 1 << 28)


def share_out() -> None:
    """Settles what each process of a run may use where nobody says it: the same for all of them."""
    ranks = current()
    if ranks.size > 1:
        ranks.room = ranks.least(free_memory() // 2 // on_this_machine())


def anonymous() -> int | None:
    """Returns the bytes of anonymous memory that are resident now; None where the system does not tell.

    Without a /proc, the bytes that are this process's alone.
    """
    if found := _numbers(Path("/proc/self/status")):
        return found.get("RssAnon")
    import psutil

    return int(psutil.Process().memory_full_info().uss)


def trim() -> None:
    """Gives freed memory back to the system, where the C library keeps some (glibc does)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _numbers(path: Path) -> dict[str, int]:
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


@dataclass(eq=False)
class Memory:
    """The limit of a run, and what follows from it.

    Attributes:
        limit: bytes.
        model: bytes of the model's weights.
        asked: whether somebody gave the limit: what does not fit is refused then, and tried otherwise.
        estimated: the largest need that was foreseen, in bytes.
        store: where arrays go that need not be in memory.
        start: bytes of anonymous memory when it was first asked whether there is room; None before.
    """

    limit: int
    model: int = 0
    asked: bool = True
    estimated: int = 0
    store: ArrayStore = field(default_factory=ArrayStore)
    start: int | None = None

    @property
    def low(self) -> bool:
        """Whether the weights are left where they lie, and what is made of them goes to disk."""
        return self.model * LARGE_MODEL > self.limit

    @classmethod
    def of(cls, size: int | str | None) -> "Memory":
        """Returns the limit that ``size`` says; half of what is free for None."""
        if size is not None:
            return cls(parse_size(size))
        room = current().room
        return cls(free_memory() // 2 if room is None else room, asked=False)

    def keep(self, nbytes: int) -> bool:
        """Returns whether something of this size that lives through the run may stay in memory."""
        return nbytes * LARGE_STREAM <= self.limit


class MemoryWatch:
    """Looks at the anonymous memory now and then, for its peak, and at the clock, as long as somebody holds it.

    Attributes:
        began: when, by ``time.perf_counter``.
        anonymous: the largest amount seen, or None where the system does not tell.
    """

    def __init__(self, seconds: float = 0.02) -> None:
        self.began, self.anonymous = time.perf_counter(), anonymous()
        if self.anonymous is not None:
            threading.Thread(target=_look, args=(weakref.ref(self), seconds), daemon=True).start()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.began

    @property
    def resident(self) -> int | None:
        """The largest resident memory of the process so far, pages of mapped files included."""
        if found := _numbers(Path("/proc/self/status")):
            return found.get("VmHWM")
        import psutil

        now = psutil.Process().memory_info()
        return int(getattr(now, "peak_wset", now.rss))  # Windows tells of a peak, macOS of none


def _look(watch: "weakref.ref[MemoryWatch]", seconds: float) -> None:
    while (held := watch()) is not None:
        held.anonymous = max(held.anonymous or 0, anonymous() or 0)
        del held
        time.sleep(seconds)
