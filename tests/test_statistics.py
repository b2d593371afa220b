"""The statistics against rliable, slow loops and the numbers that were published."""

import csv

import numpy as np
import pytest
from rliable import library, metrics
from scipy import stats

from analysis import statistics
from analysis.__main__ import default_grouping
from analysis.scores import DATA, make_study, open_table, read_scores

RLIABLE = {
    "iqm": metrics.aggregate_iqm,
    "median": metrics.aggregate_median,
    "mean": metrics.aggregate_mean,
    "optimality_gap": metrics.aggregate_optimality_gap,
}


def strata_of(scores):
    """(runs, games) or (runs, games, points) -> one array for each game."""
    return [scores[:, game] for game in range(scores.shape[1])]


@pytest.mark.parametrize("metric", RLIABLE)
@pytest.mark.parametrize(("runs", "games"), [(1, 1), (1, 3), (2, 5), (3, 26), (10, 7), (100, 26), (7, 60)])
def test_points_are_rliables(metric, runs, games):
    scores = np.random.default_rng(runs * games).gamma(0.7, 1.0, size=(runs, games)) - 0.2
    assert statistics.METRICS[metric].point(strata_of(scores)) == pytest.approx(RLIABLE[metric](scores), rel=1e-12)


@pytest.mark.parametrize("metric", RLIABLE)
def test_points_of_a_curve_are_those_of_its_places(metric):
    scores = np.random.default_rng(0).normal(size=(5, 6, 4))
    found = statistics.METRICS[metric].point(strata_of(scores))
    assert found.shape == (4,)
    for i in range(4):
        assert found[i] == pytest.approx(RLIABLE[metric](scores[:, :, i]), rel=1e-12)


def batches_of_ends(function, count):
    """Interval ends of `count` independent bootstraps, (count, 2)."""
    return np.array([function(np.random.default_rng(1_000 + i)) for i in range(count)])


@pytest.mark.parametrize("metric", RLIABLE)
def test_interval_ends_are_rliables(metric):
    """To within three standard errors of the resampling, which twenty repeated bootstraps tell."""
    scores = np.random.default_rng(3).gamma(0.7, 1.0, size=(5, 12))

    def ours(rng):
        found = statistics.estimate(strata_of(scores), rng, [metric], 1_000)[metric]
        return [found.low, found.high]

    def theirs(rng):
        np.random.seed(rng.integers(2**31))  # noqa: NPY002 - rliable draws from it, whatever its random_state
        aggregate = lambda x: np.array([RLIABLE[metric](x)])  # noqa: E731
        return library.get_interval_estimates({"x": scores}, aggregate, reps=1_000)[1]["x"][:, 0]

    one, other = batches_of_ends(ours, 20), batches_of_ends(theirs, 20)
    error = np.sqrt(one.var(axis=0, ddof=1) / 20 + other.var(axis=0, ddof=1) / 20)
    assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 3 * error).all()
    np.testing.assert_allclose(one.std(axis=0), other.std(axis=0), rtol=0.8)  # as noisy as theirs, too


def test_probability_of_improvement_is_rliables():
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 6, size=(7, 5)) + 0.5, rng.integers(0, 6, size=(4, 5)) + 0.5  # with many ties
    point = metrics.probability_of_improvement(x, y)

    def ours(rng):
        found = statistics.probability_of_improvement(strata_of(x), strata_of(y), rng, 200)
        assert found.point == pytest.approx(point, rel=1e-12)
        return [found.low, found.high]

    def theirs(rng):
        np.random.seed(rng.integers(2**31))  # noqa: NPY002 - rliable draws from it, whatever its random_state
        aggregate = lambda x, y: np.array([metrics.probability_of_improvement(x, y)])  # noqa: E731
        return library.get_interval_estimates({"x": (x, y)}, aggregate, reps=200)[1]["x"][:, 0]

    one, other = batches_of_ends(ours, 6), batches_of_ends(theirs, 6)
    error = np.sqrt(one.var(axis=0, ddof=1) / 6 + other.var(axis=0, ddof=1) / 6)
    assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 3 * error + 1e-3).all()  # ends lie on a coarse grid


def test_performance_profile_is_rliables():
    scores, thresholds = np.random.default_rng(1).gamma(0.7, 1.0, size=(6, 8)), np.linspace(0, 4, 21)
    found = statistics.performance_profile(strata_of(scores), thresholds, np.random.default_rng(0), 4_000)
    point, ends = library.create_performance_profile({"x": scores}, thresholds, reps=4_000)
    np.testing.assert_allclose(found.point, point["x"], atol=1e-12)
    np.testing.assert_allclose([found.low, found.high], ends["x"], atol=0.021)  # a run is 1 / 48


def test_resamples_against_a_loop():
    """The IQM and the other metrics of each resample, one draw at a time; games with 2 to 9 runs."""
    rng = np.random.default_rng(2)
    strata = [rng.normal(size=(runs, 3)) for runs in (2, 9, 5, 3)]
    counts = statistics._draw_counts((2, 9, 5, 3), 40, np.random.default_rng(0))
    assert counts.shape == (40, 19)
    ends = np.cumsum([0, 2, 9, 5, 3])
    for i in range(4):
        assert (counts[:, ends[i] : ends[i + 1]].sum(axis=1) == len(strata[i])).all()
    found = {name: metric.prepare(strata)(counts) for name, metric in statistics.METRICS.items()}
    for row in range(40):
        drawn = [np.repeat(s, counts[row, ends[i] : ends[i + 1]], axis=0) for i, s in enumerate(strata)]
        for point in range(3):
            pooled = sorted(value for scores in drawn for value in scores[:, point].tolist())
            middle = pooled[19 // 4 : 19 - 19 // 4]
            assert found["iqm"][row, point] == pytest.approx(sum(middle) / len(middle), abs=1e-12)
            means = [scores[:, point].mean() for scores in drawn]
            assert found["mean"][row, point] == pytest.approx(np.mean(means), abs=1e-12)
            assert found["median"][row, point] == pytest.approx(np.median(means), abs=1e-12)
            gaps = [np.mean([1 - min(value, 1) for value in scores[:, point]]) for scores in drawn]
            assert found["optimality_gap"][row, point] == pytest.approx(np.mean(gaps), abs=1e-12)


@pytest.mark.parametrize(("sizes", "resamples"), [((2, 9, 5, 3), 40), ((3,), 1), ((3, 1, 7), 5)])
def test_counts_against_a_loop_over_the_draws(sizes, resamples):
    """One game after the other, resample by resample, the high part of (32 random bits times the size)."""
    rng = np.random.default_rng(4)
    expected = np.zeros((resamples, sum(sizes)), int)
    for game, size in enumerate(sizes):
        for row in range(resamples):
            for bits in rng.integers(2**32, size=size, dtype=np.uint32).tolist():
                expected[row, sum(sizes[:game]) + bits * size // 2**32] += 1
    found = statistics._draw_counts(sizes, resamples, np.random.default_rng(4))
    np.testing.assert_array_equal(found, expected)
    starts = tuple(sum(sizes[game + 1 :]) for game in range(len(sizes)))  # the last game first
    found = statistics._draw_counts(sizes, resamples, np.random.default_rng(4), starts)
    parts = np.split(expected, np.cumsum(sizes)[:-1], axis=1)
    np.testing.assert_array_equal(found, np.concatenate(parts[::-1], axis=1))


def test_wins_against_a_loop():
    """Games of unequal numbers of runs, with ties within and between the settings."""
    rng = np.random.default_rng(6)
    ours = [rng.integers(0, 4, size=runs).astype(float) for runs in (2, 9, 1, 6)]
    theirs = [rng.integers(0, 4, size=runs).astype(float) for runs in (5, 3, 4, 1)]
    mine = statistics._draw_counts((2, 9, 1, 6), 30, rng)
    others = statistics._draw_counts((5, 3, 4, 1), 30, rng)
    found = statistics._prepare_wins(ours, theirs)(mine, others)
    for row in range(30):
        shares, i, j = [], 0, 0
        for x, y in zip(ours, theirs, strict=True):
            x_drawn = np.repeat(x, mine[row, i : i + len(x)])
            y_drawn = np.repeat(y, others[row, j : j + len(y)])
            shares.append(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in x_drawn for b in y_drawn]))
            i, j = i + len(x), j + len(y)
        assert found[row] == pytest.approx(np.mean(shares), abs=1e-12)


def test_draws_are_fair_and_independent():
    """Counts of a game are multinomial: mean 1, variance 1 - 1/n, covariance -1/n; and other games' are others."""
    counts = statistics._draw_counts((5, 5, 300), 40_000, np.random.default_rng(0)).astype(float)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.03)
    np.testing.assert_allclose(counts[:, :10].var(axis=0), 1 - 1 / 5, atol=0.03)
    covariance = np.cov(counts[:, :10].T)
    np.testing.assert_allclose(covariance[:5, 5:], 0, atol=0.03)
    np.testing.assert_allclose(covariance[0, 1:5], -1 / 5, atol=0.03)
    shares = np.bincount(counts[:, 7].astype(int), minlength=6)[:6] / 40_000
    np.testing.assert_allclose(shares, stats.binom.pmf(np.arange(6), 5, 1 / 5), atol=0.01)


def test_the_same_seed_gives_the_same_interval_on_any_number_of_cores(monkeypatch):
    strata = strata_of(np.random.default_rng(0).normal(size=(4, 5)))
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(statistics.os, "cpu_count", lambda cores=cores: cores)
        found.append(statistics.estimate(strata, np.random.default_rng(7), resamples=500))
    assert found[0] == found[1]


@pytest.mark.parametrize("strata", [[], [np.zeros(0)], [np.zeros(2), np.zeros(0)], [np.array([1.0, np.nan])]])
def test_what_cannot_be_aggregated(strata):
    with pytest.raises(ValueError, match=r"at least one|not a finite number"):
        statistics.estimate(strata, np.random.default_rng(0), resamples=10)


BBF = {  # IQM, median, mean, optimality gap at replay ratios 2 and 8, as computed apart from this project
    "BBF": [(0.940, 0.755, 2.175, 0.377), (1.033, 0.879, 2.236, 0.340)],
    "BBF+gamma=0.99": [(0.873, 0.706, 1.911, 0.370), (0.982, 0.893, 2.018, 0.327)],
    "BBF+n=10": [(0.541, 0.473, 0.887, 0.478), (0.640, 0.664, 0.923, 0.429)],
    "BBF-Annealing": [(0.649, 0.527, 1.971, 0.468), (0.852, 0.752, 2.084, 0.396)],
    "BBF-HarderResets": [(0.881, 0.733, 1.608, 0.402), (0.604, 0.594, 1.126, 0.459)],
    "BBF-Resets": [(0.653, 0.647, 1.097, 0.434), (0.398, 0.447, 0.739, 0.557)],
    "BBF-SPR": [(0.826, 0.711, 1.737, 0.397), (0.969, 0.811, 1.910, 0.340)],
    "BBF-WD": [(0.911, 0.783, 2.163, 0.381), (0.886, 0.875, 1.816, 0.348)],
    "BBF+sticky": [(0.843, 0.756, 2.039, 0.385), (1.003, 0.855, 2.120, 0.338)],
}
STICKY = {20: 0.285, 40: 0.499, 60: 0.639, 80: 0.738, 100: 0.843, 200: 1.238, 500: 1.447, 1_000: 2.215}  # ratio 2


def test_the_published_numbers_of_bbf():
    """To all their digits, by the settings that `python -m analysis --scores` tells apart by itself."""
    runs = read_scores(DATA / "bbf_published.csv.gz")
    by = default_grouping(runs, from_tables=True)
    assert by == ["agent", "replay_ratio"]
    study = make_study(runs, by, "human")
    assert len(study.scored) == 26 and study.frames.tolist() == [400_000]
    strata = [group.strata(study.scored) for group in study.groups]
    estimates = statistics.estimate_each(strata, np.random.default_rng(0), study.metrics, 10)
    found = {group.key: estimate for group, estimate in zip(study.groups, estimates, strict=True)}
    assert len(found) == 18
    for agent, published in BBF.items():
        for ratio, expected in zip((2, 8), published, strict=True):
            points = found[agent, ratio]
            names = ("iqm", "median", "mean", "optimality_gap")
            assert tuple(round(points[name].point, 3) for name in names) == expected

    sticky = [run for run in runs if (run.agent, run.settings["replay_ratio"]) == ("BBF+sticky", 2)]
    study = make_study(sticky, ["agent"], "human")
    curve = {}
    for place, frames in enumerate(study.frames):
        scores = np.concatenate([study.groups[0].normalised[game][:, place] for game in study.scored])
        curve[int(frames) // 4_000] = round(stats.trim_mean(scores, 0.25), 3)
    assert curve == STICKY


def test_the_published_numbers():
    """Medians and means to 4 decimals as printed, IQMs and intervals as recomputed, of 26 games x 100 runs."""
    study = make_study(read_scores(DATA / "atari100k_published.csv.gz"), ["agent"], "human")
    assert len(study.scored) == 26 and study.frames.tolist() == [400_000] and not study.notes
    with open_table(DATA / "atari100k_aggregates.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["n_runs_per_game"] == "100"]
    found = {
        group.label: statistics.estimate(group.strata(study.scored), np.random.default_rng(0), resamples=5_000)
        for group in study.groups
    }
    printed = [row for row in rows if row["provenance"] == "printed"]
    recomputed = [row for row in rows if row["provenance"] == "recomputed"]
    assert len(printed) == 10 and len(recomputed) == 20
    for row in printed:
        assert found[row["agent"]][row["metric"]].point == pytest.approx(float(row["value"]), abs=5e-5)
    for row in recomputed:
        interval = found[row["agent"]][row["metric"]]
        assert interval.point == pytest.approx(float(row["value"]), abs=6e-5)
        width = float(row["ci_high"]) - float(row["ci_low"])
        assert interval.low == pytest.approx(float(row["ci_low"]), abs=0.12 * width)
        assert interval.high == pytest.approx(float(row["ci_high"]), abs=0.12 * width)


def test_several_settings_at_once():
    """Each has its own interval, whether or not another has as many runs."""
    rng = np.random.default_rng(0)
    groups = []
    for shift, runs in [(0.0, 10), (5.0, 10), (10.0, 4), (15.0, 10)]:
        groups.append([shift + rng.normal(size=runs) for _ in range(6)])
    found = statistics.estimate_each(groups, np.random.default_rng(1), resamples=5_000)
    against = statistics.improvement_of_each(groups, groups[1], np.random.default_rng(2), resamples=5_000)
    for strata, each, improvement in zip(groups, found, against, strict=True):
        alone = statistics.estimate(strata, np.random.default_rng(3), resamples=5_000)
        for name, interval in alone.items():
            assert each[name].point == interval.point
            np.testing.assert_allclose(each[name], interval, atol=0.03)
        alone = statistics.probability_of_improvement(strata, groups[1], np.random.default_rng(4), resamples=5_000)
        assert improvement.point == alone.point
        np.testing.assert_allclose(improvement, alone, atol=0.02)
