"""Aggregate scores with stratified bootstrap intervals, after Agarwal et al., "Deep reinforcement learning at the edge
of the statistical precipice", 2021.

Everywhere `strata` is one array for each game, (runs,) or (runs, points): games may differ in their number of runs, and
`points` are places on a curve, each a score of its own. A resample draws runs with replacement within each game, the
games fixed, and the same runs for all points.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

Strata = Sequence[np.ndarray]
CHUNK = 64  # resamples at a time, so few that they stay in the cache


class Interval(NamedTuple):
    """A statistic and the ends of its interval; numbers, or arrays (points,)."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Metric(NamedTuple):
    """A statistic of scores, and a way to have it for many resamples at once."""

    title: str
    point: Callable[[Strata], np.ndarray]  # strata -> ()  or (points,)
    prepare: Callable[[Strata], Callable[[np.ndarray], np.ndarray]]  # strata -> (counts -> (resamples, points))


# -------------------------------------------------------------------------------------------------------- point values
def interquartile_mean(strata: Strata) -> np.ndarray:
    """Mean of the middle half of all runs of all games; of N scores, int(N / 4) are left out at either end."""
    scores = np.concatenate(strata)
    cut = len(scores) // 4
    return np.partition(scores, (cut, len(scores) - cut - 1), axis=0)[cut : len(scores) - cut].mean(axis=0)


def mean(strata: Strata) -> np.ndarray:
    """Mean over games of the mean over runs."""
    return np.mean([scores.mean(axis=0) for scores in strata], axis=0)


def median(strata: Strata) -> np.ndarray:
    """Median over games of the mean over runs."""
    return np.median([scores.mean(axis=0) for scores in strata], axis=0)


def optimality_gap(strata: Strata) -> np.ndarray:
    """Mean over games of the mean over runs of what is missing to a score of 1, nothing being gained beyond it."""
    return mean([1 - np.minimum(scores, 1) for scores in strata])


# ----------------------------------------------------------------------------------------- the same of many resamples
# A resample is a row of counts (resamples, all runs of all games): how often each run was drawn.
def _prepare_iqm(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    """Sort the scores once for all resamples.

    With K_i the number of runs drawn among the lowest i, clipped to the middle half [low, high], that half's sum is
    sum_i (K_i - K_{i-1}) s_i = high s_N - low s_1 - sum_i K_i (s_{i+1} - s_i).
    """
    scores = np.concatenate(strata)
    scores = scores.reshape(len(scores), -1)
    order = scores.argsort(axis=0)
    scores = np.take_along_axis(scores, order, axis=0)
    steps, low, high = np.diff(scores, axis=0), len(scores) // 4, len(scores) - len(scores) // 4

    def evaluate(counts: np.ndarray) -> np.ndarray:
        found = np.empty((len(counts), scores.shape[1]))
        for point in range(scores.shape[1]):
            drawn = counts.take(order[:-1, point], axis=1).cumsum(axis=1, dtype=np.int32)
            ends = high * scores[-1, point] - low * scores[0, point]
            found[:, point] = ends - drawn.clip(low, high) @ steps[:, point]
        return found / (high - low)

    return evaluate


def _game_means(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from counts to the means over runs, (games, resamples, points)."""
    ends = np.cumsum([len(scores) for scores in strata])
    tables = [scores.reshape(len(scores), -1) / len(scores) for scores in strata]
    return lambda counts: np.stack(
        [part @ table for part, table in zip(np.split(counts, ends[:-1], axis=1), tables, strict=True)]
    )


def _prepare_mean(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    means = _game_means(strata)
    return lambda counts: means(counts).mean(axis=0)


def _prepare_median(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    means = _game_means(strata)
    return lambda counts: np.median(means(counts), axis=0)


def _prepare_optimality_gap(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    return _prepare_mean([1 - np.minimum(scores, 1) for scores in strata])


METRICS = {
    "iqm": Metric("IQM", interquartile_mean, _prepare_iqm),
    "median": Metric("median", median, _prepare_median),
    "mean": Metric("mean", mean, _prepare_mean),
    "optimality_gap": Metric("optimality gap", optimality_gap, _prepare_optimality_gap),
}


def _draw_counts(sizes: Sequence[int], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `size` runs with replacement in each game; return how often each came, (resamples, sum of sizes)."""
    counts, start = np.empty((resamples, sum(sizes)), np.int32), 0
    for size in sizes:
        bits = rng.integers(2**32, size=(resamples, size), dtype=np.uint32)
        drawn = np.multiply(bits, size, dtype=np.uint64) >> 32  # 0 to size - 1, each within size / 2**32 of fair
        drawn += np.arange(0, resamples * size, size, dtype=np.uint64)[:, None]
        times = np.bincount(drawn.view(np.int64).ravel(), minlength=resamples * size)
        counts[:, start : start + size] = times.reshape(resamples, size)
        start += size
    return counts


def _in_chunks(resamples: int, rng: np.random.Generator, work: Callable[[int, np.random.Generator], np.ndarray]):
    """Do `work` for chunks of the resamples, on all cores; join what it returns along the first axis."""
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy lets other threads run while it works
        return np.concatenate(list(pool.map(work, sizes, rng.spawn(len(sizes)))))


def _interval(point: np.ndarray, draws: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return Interval(point, low.reshape(np.shape(point)), high.reshape(np.shape(point)))


def estimate(
    strata: Strata, rng: np.random.Generator, metrics: Sequence[str] = tuple(METRICS), resamples=50_000, confidence=0.95
) -> dict[str, Interval]:
    """Return {metric: value and percentile interval}: the same resamples serve all metrics.

    Raises ValueError if there is no game, a game without runs, or a score that is not a finite number.
    """
    strata = _checked(strata)
    functions = [METRICS[name].prepare(strata) for name in metrics]

    def work(size: int, rng: np.random.Generator) -> np.ndarray:
        counts = _draw_counts([len(scores) for scores in strata], size, rng)
        return np.stack([function(counts) for function in functions], axis=1)

    draws = _in_chunks(resamples, rng, work)  # (resamples, metrics, points)
    points = [METRICS[name].point(strata) for name in metrics]
    return {name: _interval(points[i], draws[:, i], confidence) for i, name in enumerate(metrics)}


def performance_profile(
    strata: Strata, thresholds: np.ndarray, rng: np.random.Generator, resamples=2_000, confidence=0.95
) -> Interval:
    """Return the share of runs with scores above each of `thresholds` (points,), games weighing the same."""
    above = [(scores[:, None] > thresholds).astype(np.float64) for scores in _checked(strata)]
    return estimate(above, rng, ["mean"], resamples, confidence)["mean"]


def probability_of_improvement(
    ours: Strata, theirs: Strata, rng: np.random.Generator, resamples=2_000, confidence=0.95
) -> Interval:
    """Return the mean over games of P(X > Y) + P(X = Y) / 2, X a run of `ours`, Y one of `theirs` on the same game."""
    pairs = zip(_checked(ours), _checked(theirs), strict=True)
    wins = [(x[:, None] > y).astype(np.float64) + 0.5 * (x[:, None] == y) for x, y in pairs]

    def work(size: int, rng: np.random.Generator) -> np.ndarray:
        total = np.zeros(size)
        for win in wins:
            rows, columns = [_draw_counts([n], size, rng) / n for n in win.shape]
            total += (rows @ win * columns).sum(axis=1)
        return total / len(wins)

    return _interval(np.mean([win.mean() for win in wins]), _in_chunks(resamples, rng, work), confidence)


def _checked(strata: Strata) -> list[np.ndarray]:
    strata = [np.asarray(scores, np.float64) for scores in strata]
    if not strata or not all(len(scores) for scores in strata):
        raise ValueError("there must be at least one game, and in every game at least one run")
    if not all(np.isfinite(scores).all() for scores in strata):
        raise ValueError("a score is not a finite number")
    return strata
