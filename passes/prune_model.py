"""The place where :func:`prune` and :func:`inspect` were in 0.1.0, for code that takes them from here."""

from liar_opt.passes.prune_job import inspect, prune
from liar_opt.passes.result import Inspection, PruneResult

__all__ = ["Inspection", "PruneResult", "inspect", "prune"]
