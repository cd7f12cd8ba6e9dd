"""Which blocks of a group stay: one number a block, or a search that sees what the others leave.

A :class:`Score` gives every block a value, the higher the more it is kept; a score that searches chooses the kept blocks
by itself, and its values are the error that each block's removal added in its turn. With x_j the channels of a block B,
W_j their rows in the consumers, variances and means over all calibration rows:

    random                 drawn with the seed
    magnitude              |W_B|_F
    magnitude-l1           sum |W_B|
    activation-weighted    sqrt(sum_j E[x_j^2] |W_j|^2)                     Wanda (arXiv 2306.11695), grouped
    ifv                    mean_j Var x_j                                   FLAP (arXiv 2312.11983) and its code
    wifv                   mean_j Var x_j |W_j|^2                           the same; FLAP's own choice
    wifn                   mean_j sqrt(E[x_j^2]) mean_i |W_ji|              the same
    output-approximation   channels: E|x_B W_B|^2; wider blocks: 1 - cos(y, y - x_B W_B)
                                                                            Greedy Output Approximation (arXiv 2407.19126)
    greedy                 removal by the least residual after repair       OBS, SlimGPT, OSSCAR; see `runtime.solve`
    swaps                  greedy, then local search by swaps               OSSCAR; see `runtime.local_search`
    fisher, taylor, snip   from gradients of a loss on labelled batches             see `passes.gradient_scores`
    knowledge              predictive and representational knowledge                K-prune; see there

What searches does so where the moments are (`runtime.arrays`); values are taken on the host.

Several consumers of one group count together: squares add up under the root, plain sums add up. The two metrics of Greedy
Output Approximation are made after its abstract's and a summary's description; its authors' code was not at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.passes.gradient_scores import KNOWLEDGE, LABELLED_SCORES, gradient_values, knowledge
from liar_opt.passes.measured import Measured
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.local_search import swap_blocks
from liar_opt.runtime.solve import Problem, select_greedy

SELECTION_RIDGE = 1e-3

Array = NDArray[np.float64]
Blocks = NDArray[np.int64]
Values = Callable[[Sequence[Measured], np.random.Generator], Array]
"""(consumers, random generator) -> one number a block; the higher the more it is kept."""
Choose = Callable[[Sequence[Measured], int, np.random.Generator], Blocks]
"""(consumers, number of blocks to keep, random generator) -> kept blocks, ascending."""
ScoreFunction = Callable[[Sequence[Measured]], Any]
"""A user's own: (consumers) -> one number a block; the higher the more it is kept."""


Channels = Callable[[Measured], Array]
"""(consumer) -> one number a channel, [n]."""


@dataclass(frozen=True)
class Score:
    """How the blocks that stay are found.

    Attributes:
        values: one number a block.
        choose: a search of its own; None keeps the highest values.
        channels: what the values are means of over the channels of each block; None where they are not.
    """

    values: Values
    choose: Choose | None = None
    channels: Channels | None = None

    def deviation(self, consumers: Sequence[Measured], values: Array) -> float:
        """Returns the standard deviation by which FLAP's threshold standardises: of channels, where the values have any."""
        if self.channels is None:
            return float(values.std())
        return float(np.sqrt(sum(self.channels(c.on_host()).var() for c in consumers)))

    def of_blocks(self, consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
        """Returns the values of all blocks."""
        return self.values(consumers if self.choose is not None else [c.on_host() for c in consumers], rng)

    def select(self, consumers: Sequence[Measured], keep: int, rng: np.random.Generator) -> Blocks:
        """Returns the kept blocks, ascending."""
        if self.choose is not None:
            return self.choose(consumers, keep, rng)
        return np.sort(np.argsort(-self.of_blocks(consumers, rng), kind="stable")[:keep]).astype(np.int64)


def score_of_function(function: ScoreFunction) -> Score:
    """Makes a score of a user's function, whose result is checked at every call."""
    name = getattr(function, "__name__", type(function).__name__)

    def values(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
        blocks = consumers[0].blocks
        try:
            result = np.asarray(function(consumers), dtype=np.float64)
        except (TypeError, ValueError) as err:
            raise OptionError(f"score function '{name}' did not return numbers ({err}); return one a block") from err
        if result.shape != (blocks,):
            shape = list(result.shape)
            raise OptionError(
                f"score function '{name}' returned shape {shape}; return a number for each of {blocks} blocks"
            )
        if np.isnan(result).any():
            first = int(np.flatnonzero(np.isnan(result))[0])
            raise OptionError(f"score function '{name}' returned NaN for block {first}; return -inf to remove it first")
        return result

    return Score(values)


def row_squares(consumer: Measured) -> Array:
    """Returns |W_j|^2 of every channel, [n]."""
    return np.asarray(np.square(consumer.weight, dtype=np.float64).sum(axis=1))


def problems_of(consumers: Sequence[Measured]) -> list[Problem]:
    """Returns the consumers as the solver's problems."""
    return [Problem(c.covariance, c.weight, c.owners, c.target_scale**2) for c in consumers]


def random(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
    """A seeded permutation: each block's rank."""
    result = np.empty(consumers[0].blocks)
    order = rng.permutation(result.size)
    result[order] = np.arange(result.size, 0, -1)
    return result


def magnitude(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
    """L2 norm of each block's rows."""
    return np.sqrt(sum(c.by_block(row_squares(c)) for c in consumers))


def magnitude_l1(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
    """Sum of magnitudes of each block's rows."""
    return np.asarray(sum(c.by_block(np.abs(c.weight).sum(axis=1)) for c in consumers))


def activation_weighted(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
    """Wanda's score with the rows of a block grouped."""
    return np.sqrt(sum(c.by_block(row_squares(c) * c.statistics.mean_square) for c in consumers))


def _block_mean(consumer: Measured, channels: Array) -> Array:
    return consumer.by_block(channels) / np.maximum(consumer.by_block(np.ones(channels.size)), 1.0)


def _variances(consumer: Measured) -> Array:
    return np.diagonal(consumer.statistics.covariance).astype(np.float64)


def ifv(consumer: Measured) -> Array:
    """Input feature variance."""
    return _variances(consumer)


def wifv(consumer: Measured) -> Array:
    """Weighted input feature variance."""
    return _variances(consumer) * row_squares(consumer)


def wifn(consumer: Measured) -> Array:
    """Weighted input feature norm."""
    return np.asarray(np.sqrt(consumer.statistics.mean_square) * np.abs(consumer.weight).mean(axis=1))


def _averaged(channels: Channels) -> Score:
    def values(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
        return np.asarray(sum(_block_mean(c, channels(c)) for c in consumers))

    return Score(values, channels=channels)


def _pairs(consumer: Measured) -> Array:
    """E[x_A W_A . x_B W_B] for all pairs of blocks, [k, k]."""
    weight = consumer.weight.astype(np.float64)
    weighted = consumer.statistics.uncentred * (weight @ weight.T)
    ones = np.zeros((consumer.blocks, consumer.owners.size))
    ones[consumer.owners, np.arange(consumer.owners.size)] = 1.0
    return np.asarray(ones @ weighted @ ones.T)


def _alone(consumers: Sequence[Measured]) -> Array:
    """E|x_B W_B|^2 of each block, [k]."""
    return np.asarray(sum(np.diagonal(_pairs(c)) * c.target_scale**2 for c in consumers))


def output_approximation(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
    """What zeroing one block alone does to the output, from the second moments."""
    result = np.zeros(consumers[0].blocks)
    for consumer in consumers:
        if consumer.owners.size == consumer.blocks:
            result += _alone([consumer])
            continue
        pairs = _pairs(consumer)
        power, own, with_all = pairs.sum(), np.diagonal(pairs), pairs.sum(axis=1)
        left = np.maximum(power - 2.0 * with_all + own, 0.0)  # E|y - x_B W_B|^2
        norms = np.sqrt(power * left)
        result += 1.0 - np.divide(power - with_all, norms, out=np.zeros_like(norms), where=norms > 0)
    return result


def removal_errors(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
    """What each block's removal adds to the residual, when it is its turn in the greedy order."""
    selection = select_greedy(problems_of(consumers), 0, SELECTION_RIDGE)
    result = np.empty(selection.removed_blocks.size)
    result[selection.removed_blocks] = np.maximum.accumulate(np.diff(selection.errors, prepend=0.0))
    return result


def greedy(consumers: Sequence[Measured], keep: int, rng: np.random.Generator) -> Blocks:
    """Removes, one after the other, the block that costs least after repair."""
    return select_greedy(problems_of(consumers), keep, SELECTION_RIDGE).kept_blocks


def swaps(consumers: Sequence[Measured], keep: int, rng: np.random.Generator) -> Blocks:
    """Local search from the greedy selection."""
    problems = problems_of(consumers)
    return swap_blocks(problems, select_greedy(problems, keep, SELECTION_RIDGE).kept_blocks, SELECTION_RIDGE)


def _of_gradients(name: str) -> Values:
    def values(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
        gradients = consumers[0].gradients
        if gradients is None:
            raise OptionError(f"score '{name}' needs gradients: give a torch module, labelled batches and a loss")
        return gradient_values(name, gradients)

    return values


def knowledge_values(consumers: Sequence[Measured], rng: np.random.Generator) -> Array:
    """Predictive and representational knowledge together."""
    gradients = consumers[0].gradients
    if gradients is None:
        raise OptionError(f"score '{KNOWLEDGE}' needs gradients: give a torch module")
    return knowledge(gradients, _alone(consumers))


SCORES: dict[str, Score] = {
    "greedy": Score(removal_errors, greedy),
    "swaps": Score(removal_errors, swaps),
    "activation-weighted": Score(activation_weighted),
    "output-approximation": Score(output_approximation),
    "wifv": _averaged(wifv),
    "wifn": _averaged(wifn),
    "ifv": _averaged(ifv),
    "magnitude": Score(magnitude),
    "magnitude-l1": Score(magnitude_l1),
    "random": Score(random),
    **{name: Score(_of_gradients(name)) for name in LABELLED_SCORES},
    KNOWLEDGE: Score(knowledge_values),
}
