"""Idle shares of engines and learner in a step of RL whose completions differ in length.

    Lengths: log-normal, clipped ──> how long an engine's share takes, and the slowest engine's ──┐
    planned_time.py: seconds of decoding, learning, weights ──────────────────────────────────────┴──> idle() ──> Idle

Legend: n completions of a step for each of E engines, N = E n; F(k) the share of completions of at most k tokens; d(n)
seconds of a decoding step of n sequences; s ``rl.max_staleness``; U seconds in which an engine loads weights; A seconds
in which the learner learns, gathers and publishes weights; T seconds of a step.

At the k-th decoding step of an engine's share, ``n (1 - F(k))`` sequences are left on average, and at least one of n is
left with probability ``1 - F(k)^n``. So a share takes ``D = sum_k d(n (1 - F(k))) (1 - F(k)^n)``, and the slowest of
all shares takes R, which has N instead of n in the exponent.

    s = 0              T = R + A + U
    s > 0, drain       T = max(A, R + U), since requests in flight end before each update
    s > 0, continue    T = |A, W + U, (R + A + U) / (s + 1)|, with W = n E[l] d(most) / most the engine's work, and R at
                       the ``n E[l] d / T`` sequences that an engine holds on average

R also accounts for the engine with the most tokens, since E sums of n lengths differ. An engine is idle for the share
``1 - (D + U) / T`` of a step. With continue, the shares of s + 1 steps overlap, each started A after the previous one.
An engine is then idle while none of them has a completion left: the integral of ``prod_j F((t - j A) / d)^n`` over
their cycle of (s + 1) T. The learner is idle for ``1 - A / T``. Lost workers, evaluation, checkpoints, slow verifiers
and environments, and further rounds of dynamic sampling are not included. ``benchmarks/scale.py`` compares this with
the real controller in simulated time.
"""

from dataclasses import dataclass

import numpy as np

from cola_ray.settings.config import Config, is_environment
from cola_ray.studies.planned_time import EXPECTED, Assumed, Decoding, Gpu, decoding, mean_answer, step_time, update
from cola_ray.studies.planned_work import Sizes

Array = np.ndarray
_POINTS = 2048
"""Number of points of an integral over time."""
_SHARPNESS = 8
"""Exponent of the norm that combines the bounds of a step if shares overlap: two bounds that are near each other act
together, since both fluctuate. Fitted to benchmarks/scale.py; a maximum would be the infinite norm."""


@dataclass(frozen=True)
class Idle:
    """Duration of a step, and how much of it engines and learner are idle."""

    step: float  # seconds
    engines: float  # share of it in which an engine neither decodes nor loads
    learner: float  # share of it in which the learner neither learns nor publishes weights


class Lengths:
    """Tokens of completions: log-normal, at least 1 and at most ``limit``, and of the given mean after that.

    Args:
        spread: standard deviation of the logarithm; 0: all have the mean length.

    Attributes:
        longer: (limit,), ``1 - F(k)``: the share of completions with more than k tokens.
    """

    def __init__(self, mean: float, spread: float, limit: int) -> None:
        self.mean, self.limit = min(mean, float(limit)), limit
        self.spread = spread if self.mean < limit else 0.0
        low, high = np.log(self.mean) - 10.0, np.log(limit) + 10.0
        for _ in range(60):  # the mean after clipping rises with the median
            self.median = float(np.exp((low + high) / 2))
            self.longer = self._longer()
            low, high = (low, np.log(self.median)) if self.longer.sum() > mean else (np.log(self.median), high)

    def _longer(self) -> Array:
        from scipy.special import ndtr

        tokens = np.arange(self.limit, dtype=np.float64)
        if not self.spread:
            return np.clip(self.mean - tokens, 0.0, 1.0)
        tokens[0] = 1e-9  # lengths below one token count as one
        found: Array = ndtr(-np.log(tokens / self.median) / self.spread)
        return found

    @property
    def deviation(self) -> float:
        """Standard deviation of a completion's tokens."""
        square = float((2 * np.arange(self.limit) + 1) @ self.longer)  # E[l^2] = sum_k (2 k + 1) P(l > k)
        return max(square - float(self.longer.sum()) ** 2, 0.0) ** 0.5

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Lengths of that shape, int64."""
        median = self.median if self.spread else self.mean
        drawn = np.ceil(median * np.exp(self.spread * rng.standard_normal(shape)))
        return np.clip(drawn, 1, self.limit).astype(np.int64)


def answers(config: Config) -> Lengths:
    """Lengths of completions; for agents, of whole episodes, which end with their context."""
    rollout = config.rollout
    limit = rollout.max_new_tokens + rollout.max_prompt_tokens * is_environment(config.task.name)
    return Lengths(mean_answer(config), config.hardware.response_spread, limit)


def idle(config: Config, m: Sizes, gpu: Gpu, assumed: Assumed = EXPECTED) -> Idle:
    """Idle shares under these settings, with ``hardware.response_spread`` as the spread of completions' lengths."""
    planned, (hands_over, loads) = step_time(config, m, gpu, assumed), update(config, m, assumed)
    busy = planned.critic + planned.learn + hands_over
    lengths = answers(config)
    late, engines = config.rl.max_staleness, config.rollout.num_workers
    if late and config.rl.update_mode == "continue":
        engine = decoding(config, m, gpu, assumed, late + 1)
        return _overlapping(lengths, engine, engines, late, busy, loads)
    share, slowest = _apart(lengths, decoding(config, m, gpu, assumed), engines)
    step = max(busy, slowest + loads) if late else slowest + busy + loads
    return Idle(step, 1 - (share + loads) / step, 1 - busy / step)


def _apart(lengths: Lengths, engine: Decoding, engines: int) -> tuple[float, float]:
    """D and R: seconds of an engine's share of one step, and of the slowest share."""
    longer, n = lengths.longer, engine.sequences
    seconds = np.array([engine.seconds(min(sequences, engine.most)) for sequences in n * longer])
    waits = (n - engine.most) / engine.most * lengths.mean * engine.seconds(engine.most)  # for a place in the engine
    before = engine.prefill + max(waits, 0.0)
    of_one, of_all = (float(seconds @ (1 - (1 - longer) ** count)) for count in (n, n * engines))
    return before + of_one, before + of_all + _most_tokens(lengths, n, engines) * engine.cache


def _most_tokens(lengths: Lengths, sequences: float, engines: int) -> float:
    """How many more tokens the engine with the most has than the average engine, in expectation (Blom)."""
    from scipy.special import ndtri

    return float(lengths.deviation * sequences**0.5 * ndtri((engines - 0.375) / (engines + 0.25)))


def _overlapping(lengths: Lengths, engine: Decoding, engines: int, late: int, busy: float, loads: float) -> Idle:
    n, slots = engine.sequences, late + 1
    longest = float(np.sum(1 - (1 - lengths.longer) ** (n * engines)))
    work = n * lengths.mean * engine.seconds(engine.most) / engine.most

    def decodes(step: float) -> float:
        """Seconds of a decoding step if a step of the run takes ``step`` seconds."""
        held = 1.0
        for _ in range(50):
            held = min(n * lengths.mean * engine.seconds(held) / step, engine.most)
        return engine.seconds(held)

    def needed(step: float) -> float:
        """Seconds that a step needs if it takes ``step`` seconds; decreases with ``step``."""
        decoded = longest * decodes(step)
        slowest = engine.prefill + decoded * (1 + loads / step)
        slowest += _most_tokens(lengths, n * max(decoded / step, 1.0), engines) * engine.cache
        bounds = (busy, engine.prefill + work + loads, (slowest + busy + loads) / slots)
        return float(np.linalg.norm(bounds, _SHARPNESS))

    low, high = 1e-3, needed(1e-3)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) > middle else (low, middle)
    # The learner frees one slot after the other, so shares that began together end up one learner step apart.
    starts = np.arange(slots) * min(busy, high)
    idle_share = _nobody_decodes(lengths, engine, decodes(high) * (1 + loads / high), slots * high, starts, loads)
    return Idle(high, idle_share, 1 - busy / high)


def _nobody_decodes(
    lengths: Lengths, engine: Decoding, seconds: float, cycle: float, starts: Array, loads: float
) -> float:
    """Share of a cycle in which an engine has no completion in flight and does not load.

    Args:
        seconds: of a decoding step.
        starts: when the share of each step starts within the cycle; weights are loaded before each.
    """
    now = (np.arange(_POINTS) + 0.5) / _POINTS * cycle
    at_most = np.append((1 - lengths.longer) ** engine.sequences, 1.0)  # P(a share's longest has <= k tokens)
    nobody = np.ones(_POINTS)
    for start in starts:
        since = (now - start) % cycle
        tokens = np.clip((since - engine.prefill) / seconds, 0, lengths.limit)
        nobody *= np.interp(tokens, np.arange(lengths.limit + 1), at_most) * (since >= engine.prefill)
        nobody *= since < cycle - loads
    return float(nobody.mean())
