"""Aggregate scores with stratified bootstrap intervals, after Agarwal et al., "Deep reinforcement learning at the edge
of the statistical precipice", 2021.

Everywhere `strata` is one array for each game, (runs,) or (runs, points): games may differ in their number of runs, and
`points` are places on a curve, each a score of its own. A resample draws runs with replacement within each game, the
games fixed, and the same runs for all points.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Strata = Sequence[np.ndarray]
CHUNK = 64  # resamples at a time, so few that they stay in the cache

# With fewer runs of a game an interval doesn't tell: resamples can only repeat these few, so that it is too narrow.
# Of 100 pairs of draws from the same published runs (three games of Atari 100k), probability_of_improvement saw a
# difference in 15 with two runs of each game, and in 7 with five; a 95% interval promises 5.
ENOUGH_RUNS = 5


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
            drawn = counts.take(order[:-1, point], axis=1)
            np.cumsum(drawn, axis=1, out=drawn)
            np.clip(drawn, low, high, out=drawn)
            ends = high * scores[-1, point] - low * scores[0, point]
            found[:, point] = ends - drawn @ steps[:, point]
        return found / (high - low)

    return evaluate


def _prepare_mean(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    """Weigh every run once: the mean over games of means over runs is linear in the counts."""
    weighed = [scores.reshape(len(scores), -1) / (len(scores) * len(strata)) for scores in strata]
    table = np.concatenate(weighed)
    return lambda counts: counts @ table


def _prepare_median(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    weighed = [scores.reshape(len(scores), -1) / len(scores) for scores in strata]
    table = np.concatenate(weighed)
    starts = _starts([len(scores) for scores in strata])
    middle = [(len(strata) - 1) // 2, len(strata) // 2]  # the same, if the number of games is odd

    def evaluate(counts: np.ndarray) -> np.ndarray:
        counts = counts.astype(np.float64)
        found = np.empty((len(counts), table.shape[1]))
        for point in range(table.shape[1]):
            means = np.add.reduceat(counts * table[:, point], starts, axis=1)  # (resamples, games)
            found[:, point] = np.partition(means, middle, axis=1)[:, middle].mean(axis=1)
        return found

    return evaluate


def _prepare_optimality_gap(strata: Strata) -> Callable[[np.ndarray], np.ndarray]:
    return _prepare_mean([1 - np.minimum(scores, 1) for scores in strata])


METRICS = {
    "iqm": Metric("IQM", interquartile_mean, _prepare_iqm),
    "median": Metric("median", median, _prepare_median),
    "mean": Metric("mean", mean, _prepare_mean),
    "optimality_gap": Metric("optimality gap", optimality_gap, _prepare_optimality_gap),
}


def _starts(sizes: Sequence[int]) -> np.ndarray:
    """Where each game begins among all runs of all games, (games,)."""
    return np.cumsum([0, *sizes[:-1]])


def _draw_counts(
    sizes: tuple[int, ...], resamples: int, rng: np.random.Generator, starts: tuple[int, ...] = ()
) -> np.ndarray:
    """Draw `size` runs with replacement in each game; return how often each came, (resamples, sum of sizes).

    The columns of a game begin at its number of `starts`; without them games follow each other as they are drawn.
    """
    size, first = _places(sizes, starts, resamples)
    pairs = rng.integers(2**64, size=(len(size) + 1) // 2, dtype=np.uint64)  # faster than twice as many of 32 bits
    place = pairs.view(np.uint32)[: len(size)].astype(np.uint64)
    place *= size
    place >>= 32  # 0 to size - 1, each within size / 2**32 of fair
    place += first
    times = np.bincount(place.view(np.int64), minlength=len(size))
    return times.reshape(resamples, -1).astype(np.int32)


@lru_cache(maxsize=4)  # all chunks of a bootstrap but the last share them
def _places(sizes: tuple[int, ...], starts: tuple[int, ...], resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """For each draw, game by game and resample by resample: its game's size, and the place of its game's first count.

    All games are drawn at once, as a chunk of one game is so small that calling NumPy takes longer than its work.
    """
    draws = np.multiply(sizes, resamples)  # (games,)
    rows = [np.repeat(np.arange(resamples), size) for size in sizes]
    first = np.concatenate(rows) * sum(sizes) + np.repeat(starts or _starts(sizes), draws)
    return np.repeat(np.array(sizes, np.uint64), draws), first.astype(np.uint64)


def _in_chunks(resamples: int, rng: np.random.Generator, work: Callable[[int, np.random.Generator], np.ndarray]):
    """Do `work` for chunks of the resamples, on all cores; join what it returns along the first axis."""
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    draws = [np.empty(0)] * len(sizes)
    chunks = enumerate(zip(sizes, rng.spawn(len(sizes)), strict=True))

    def take_chunks(_: int) -> None:
        for number, (size, stream) in chunks:  # all threads take theirs from here, and hear of no other
            draws[number] = work(size, stream)

    threads = os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets other threads run while it works
        list(pool.map(take_chunks, range(threads)))
    return np.concatenate(draws)


def _interval(point: np.ndarray, draws: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return Interval(point, low.reshape(np.shape(point)), high.reshape(np.shape(point)))


def estimate(
    strata: Strata, rng: np.random.Generator, metrics: Sequence[str] = tuple(METRICS), resamples=50_000, confidence=0.95
) -> dict[str, Interval]:
    """Return {metric: value and percentile interval}: the same resamples serve all metrics.

    Raises ValueError if there is no game, a game without runs, or a score that is not a finite number.
    """
    return estimate_each([strata], rng, metrics, resamples, confidence)[0]


def estimate_each(
    groups: Sequence[Strata], rng: np.random.Generator, metrics=tuple(METRICS), resamples=50_000, confidence=0.95
) -> list[dict[str, Interval]]:
    """Do the same for several settings; those with as many runs in each game share the draws, which take longest."""
    groups = [_checked(strata) for strata in groups]
    found = [{} for _ in groups]
    for sizes, alike in _by_sizes(groups).items():
        asked = [(number, name) for number in alike for name in metrics]
        functions = [METRICS[name].prepare(groups[number]) for number, name in asked]

        def work(size: int, rng: np.random.Generator, sizes=sizes, functions=functions) -> np.ndarray:
            counts = _draw_counts(sizes, size, rng)
            return np.stack([function(counts) for function in functions], axis=1)

        draws = _in_chunks(resamples, rng, work)  # (resamples, settings and metrics, points)
        for place, (number, name) in enumerate(asked):
            point = METRICS[name].point(groups[number])
            found[number][name] = _interval(point, draws[:, place], confidence)
    return found


def _by_sizes(groups: Sequence[Strata]) -> dict[tuple[int, ...], list[int]]:
    """{number of runs in each game: places of the settings that have so many}."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, strata in enumerate(groups):
        found.setdefault(tuple(len(scores) for scores in strata), []).append(number)
    return found


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
    return improvement_of_each([ours], theirs, rng, resamples, confidence)[0]


def improvement_of_each(
    groups: Sequence[Strata], theirs: Strata, rng: np.random.Generator, resamples=2_000, confidence=0.95
) -> list[Interval]:
    """Do the same for several settings; those with as many runs in each game share the draws."""
    groups, theirs = [_checked(strata) for strata in groups], _checked(theirs)
    others = [len(y) for y in theirs]
    found = [None] * len(groups)
    for mine, alike in _by_sizes(groups).items():
        functions = [_prepare_wins(groups[number], theirs) for number in alike]
        runs = sum(mine)
        sizes = _in_turn(mine, others)  # as they are drawn
        starts = _in_turn(_starts(mine), runs + _starts(others))  # as they are counted: ours, then theirs

        def work(size: int, rng: np.random.Generator, sizes=sizes, starts=starts, functions=functions, runs=runs):
            counts = _draw_counts(sizes, size, rng, starts)
            return np.stack([function(counts[:, :runs], counts[:, runs:]) for function in functions], axis=1)

        draws = _in_chunks(resamples, rng, work)  # (resamples, settings)
        for place, number in enumerate(alike):
            pairs = zip(groups[number], theirs, strict=True)
            wins = [(x[:, None] > y) + 0.5 * (x[:, None] == y) for x, y in pairs]
            point = np.mean([win.mean() for win in wins])
            found[number] = _interval(point, draws[:, place], confidence)
    return found


def _in_turn(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """(a1, a2, ...), (b1, b2, ...) -> (a1, b1, a2, b2, ...)."""
    return tuple(np.stack([first, second], axis=1).ravel().tolist())


def _prepare_wins(ours: Strata, theirs: Strata) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function from counts of ours and theirs, (resamples, runs) each, to probabilities of improvement.

    A run x beats as many of theirs as were drawn below x, and half of those that equal it: with B(x) drawn below x and
    A(x) not above it, (B(x) + A(x)) / 2. Theirs are sorted within each game once, so that both are running totals.
    """
    starts = _starts([len(y) for y in theirs])
    games = list(zip(starts, ours, theirs, strict=True))
    order = np.concatenate([start + y.argsort() for start, _, y in games])
    below = np.concatenate([start + np.searchsorted(np.sort(y), x, "left") for start, x, y in games])
    not_above = np.concatenate([start + np.searchsorted(np.sort(y), x, "right") for start, x, y in games])
    before = np.concatenate([np.full(len(x), 2 * start, np.int32) for start, x, _ in games])  # of the games before
    weights = np.concatenate([np.full(len(x), 1 / (2 * len(x) * len(y) * len(games))) for _, x, y in games])

    def evaluate(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
        total = np.zeros((len(others), len(order) + 1), np.int32)
        np.cumsum(others.take(order, axis=1), axis=1, out=total[:, 1:])
        wins = total.take(below, axis=1)
        wins += total.take(not_above, axis=1)
        wins -= before
        wins *= mine
        return wins @ weights

    return evaluate


def _checked(strata: Strata) -> list[np.ndarray]:
    strata = [np.asarray(scores, np.float64) for scores in strata]
    if not strata or not all(len(scores) for scores in strata):
        raise ValueError("there must be at least one game, and in every game at least one run")
    if not all(np.isfinite(scores).all() for scores in strata):
        raise ValueError("a score is not a finite number")
    return strata
