"""The numbers of a study: what the tables print and the figures draw."""

from dataclasses import dataclass

import numpy as np

from analysis import statistics
from analysis.runs import BadInput
from analysis.scores import Group, Study, read_random
from analysis.statistics import Interval

CURVE_RESAMPLES = 2_000  # at most, of curves and profiles, which have hundreds of points
POINTS = 201  # at most, of a curve


@dataclass
class Results:
    study: Study
    reference: Group  # drawn in black; what improvements are over
    resamples: int
    aggregates: dict[str, dict[str, Interval]]  # label -> metric -> interval
    frames: np.ndarray  # (points,) of the curves
    curves: dict[str, Interval]  # label -> IQM against frames
    hours: dict[str, np.ndarray]  # label -> (points,) mean over all runs; only of groups that know it
    thresholds: np.ndarray  # (points,) of the profiles
    profiles: dict[str, Interval]
    improvement: dict[str, Interval]  # label -> probability of improvement over the reference
    gains: dict[str, dict[str, float]]  # label -> game -> percent over the reference, of what it gains on random play

    @property
    def others(self) -> list[Group]:
        return [group for group in self.study.groups if group is not self.reference]

    @property
    def ordered(self) -> list[Group]:
        """The groups, the reference first."""
        return [self.reference, *self.others]

    @property
    def caption(self) -> str:
        """What every figure says of its data."""
        few = f" (†: fewer than {statistics.ENOUGH_RUNS} in a game, too few to tell)"
        marked = few if self.study.mark(*self.study.groups) else ""
        return f"{self.counted(self.study.scored)}{marked}, 95% stratified bootstrap intervals"

    def counted(self, games: list[str]) -> str:
        """How many games and seeds."""
        return f"{len(games)} game{'s' * (len(games) != 1)}, {self.study.seeds}"


def find_label(labels: list[str], name: str) -> str:
    """This label, or that of this agent if it is the only one. Raises BadInput."""
    found = [label for label in labels if label == name] or [label for label in labels if label.split(",")[0] == name]
    if len(found) != 1:
        there = "; ".join(labels)
        raise BadInput(f"{name!r} names {len(found)} settings: give one of {there}, or group otherwise with --by.")
    return found[0]


def find_group(groups: list[Group], name: str) -> Group:
    """The group of this label, or of this agent if it is the only one. Raises BadInput."""
    label = find_label([group.label for group in groups], name)
    return next(group for group in groups if group.label == label)


def default_reference(study: Study) -> Group:
    """The setting with a batch of 32, the study's default, or the first."""
    place = study.by.index("batch_size") if "batch_size" in study.by else None
    usual = [group for group in study.groups if place is not None and group.key[place] == 32]
    return (usual or study.groups)[0]


def compute(study: Study, reference: str | None, resamples: int, rng: np.random.Generator) -> Results:
    """Compute every statistic of a study. The intervals are percentile intervals of 95%."""
    chosen = find_group(study.groups, reference) if reference else default_reference(study)
    few = min(resamples, CURVE_RESAMPLES)
    points = np.unique(np.linspace(0, len(study.frames) - 1, POINTS).round().astype(int))
    last = np.concatenate([np.concatenate(group.strata(study.scored)) for group in study.groups])
    thresholds = np.linspace(min(0.0, last.min()), np.quantile(last, 0.99), POINTS)
    groups, labels = study.groups, [group.label for group in study.groups]
    strata = [group.strata(study.scored) for group in groups]
    whole = [[group.normalised[game][:, points] for game in study.scored] for group in groups]
    streams = rng.spawn(3 + len(groups))
    found = statistics.estimate_each(strata, streams[0], study.metrics, resamples)
    aggregates = dict(zip(labels, found, strict=True))
    found = statistics.estimate_each(whole, streams[1], ["iqm"], few)
    curves = {label: each["iqm"] for label, each in zip(labels, found, strict=True)}
    others = [group for group in groups if group is not chosen]
    theirs = chosen.strata(study.scored)
    found = statistics.improvement_of_each(
        [group.strata(study.scored) for group in others], theirs, streams[2], resamples
    )
    improvement = {group.label: each for group, each in zip(others, found, strict=True)}
    gains = {group.label: per_game_gains(group, chosen, study.games) for group in others}
    hours, profiles = {}, {}
    for group, scores, stream in zip(groups, strata, streams[3:], strict=True):
        profiles[group.label] = statistics.performance_profile(scores, thresholds, stream, few)
        if group.hours:
            hours[group.label] = np.concatenate([group.hours[game] for game in study.scored]).mean(axis=0)[points]
    shown = (study.frames[points], curves, hours, thresholds, profiles, improvement, gains)
    return Results(study, chosen, resamples, aggregates, *shown)


def per_game_gains(group: Group, reference: Group, games: list[str]) -> dict[str, float]:
    """Compare the mean final scores A of `group` and B of `reference`: how much A gains, in percent of B's own gain.

    100 (A - B) / |B - random|; random play counts as 0 where its score is not known. Infinite where B = random.
    """
    random_play, gains = read_random(), {}
    for game in games:
        ours, theirs = group.raw[game][:, -1].mean(), reference.raw[game][:, -1].mean()
        base = abs(theirs - random_play.get(game, 0.0))
        with np.errstate(divide="ignore"):
            gains[game] = float(100 * np.divide(ours - theirs, base)) if ours != theirs else 0.0
    return gains


# --------------------------------------------------------------------------------------------------------------- tables
@dataclass
class Table:
    """Rows of text and numbers; `digits` after the point are printed, all are kept in the CSV file."""

    name: str  # of the files
    title: str
    columns: list[str]
    rows: list[list]
    digits: int = 3


RUNS = ["fewest runs", "too few"]  # columns beside every interval


def _runs(study: Study, *groups: Group) -> list:
    """Runs in the game that has fewest, and a dagger if they are too few."""
    return [study.fewest(*groups), study.mark(*groups).strip()]


def tables(results: Results) -> list[Table]:
    """All tables, the most important first."""
    study, made = results.study, []
    rows = []
    for group in results.ordered:
        for name, found in results.aggregates[group.label].items():
            title = statistics.METRICS[name].title
            ends = [float(found.point), float(found.low), float(found.high)]
            rows.append([group.label, title, *ends, *_runs(study, group)])
    columns = ["setting", "metric", "value", "low", "high", *RUNS]
    made.append(Table("aggregates", f"Aggregates ({study.unit})", columns, rows))
    if results.others:
        rows = []
        for group in results.others:
            found, gains = results.improvement[group.label], results.gains[group.label]
            won = sum(gain > 0 for gain in gains.values())
            lost = sum(gain < 0 for gain in gains.values())
            ends = [float(found.point), float(found.low), float(found.high)]
            rows.append([group.label, *ends, *_runs(study, group, results.reference), won, lost])
        columns = ["setting", "probability of improvement", "low", "high", *RUNS, "games won", "games lost"]
        made.append(Table("improvement", f"Against {results.reference.label}", columns, rows))
    rows = []
    for game in study.games:
        for group in results.ordered:
            final = group.raw[game][:, -1]
            normalised = float(group.normalised[game][:, -1].mean()) if game in group.normalised else None
            gain = results.gains.get(group.label, {}).get(game)
            deviation = float(final.std(ddof=1)) if len(final) > 1 else None
            rows.append([game, group.label, len(final), float(final.mean()), deviation, normalised, gain])
    columns = ["game", "setting", "seeds", "mean return", "standard deviation", study.unit, "gain, %"]
    made.append(Table("games", f"Games, at {study.frames[-1]:,} frames", columns, rows))
    rows = []
    for group in results.ordered:
        found = results.curves[group.label]
        hours, marks = results.hours.get(group.label), _runs(study, group)
        for i, frames in enumerate(results.frames):
            ends = [float(found.point[i]), float(found.low[i]), float(found.high[i])]
            rows.append([group.label, int(frames), *ends, *marks, float(hours[i]) if hours is not None else None])
    columns = ["setting", "frames", "IQM", "low", "high", *RUNS, "hours"]
    made.append(Table("curves", "IQM against frames", columns, rows))
    rows = []
    for group in results.ordered:
        for game in study.games:
            key = [value for name, value in zip(study.by, group.key, strict=True) if name != "agent"]
            scaled = group.normalised.get(game, np.full(group.raw[game].shape, None))
            for run, *values in zip(group.runs[game], group.raw[game].tolist(), scaled.tolist(), strict=True):
                for frames, score, value in zip(study.frames.tolist(), *values, strict=True):
                    rows.append([group.label, run.agent, game, run.seed, frames, score, value, *key])
    columns = ["setting", "agent", "game", "seed", "frames", "score", "normalised"]
    columns += [name for name in study.by if name != "agent"]
    made.append(Table("scores", "Every score", columns, rows))
    return made
