"""Two settings side by side, in plain words."""

import numpy as np

from analysis import statistics
from analysis.results import find_group, per_game_gains
from analysis.runs import BadInput
from analysis.scores import Study


def compare(study: Study, first: str, second: str, resamples: int, rng: np.random.Generator) -> str:
    """Return the text that compares two settings of a study. Raises BadInput if they are not two of its settings."""
    a, b = find_group(study.groups, first), find_group(study.groups, second)
    if a is b:
        raise BadInput(f"{first!r} and {second!r} are the same setting, {a.label}.")
    games, streams = study.scored, rng.spawn(3)
    ours, theirs = a.strata(games), b.strata(games)
    found = [statistics.estimate(x, streams.pop(), resamples=resamples) for x in (ours, theirs)]
    better = statistics.probability_of_improvement(ours, theirs, streams.pop(), resamples)
    width = max(len(group.label) for group in (a, b))
    counted = f"{len(games)} game{'s' * (len(games) != 1)}, {study.seeds}, {study.frames[-1]:,} frames"
    lines = [f"{study.unit} ({counted})", ""]
    for name, metric in statistics.METRICS.items():
        for group, interval in zip((a, b), found, strict=True):
            point = interval[name]
            title = metric.title if group is a else ""
            lines.append(f"{title:15} {group.label:{width}}  {point.point:9.3f}   [{point.low:.3f}, {point.high:.3f}]")
    lines += ["", f"A run of {a.label} beats one of {b.label} on the same game with probability {better.point:.2f}"]
    lines[-1] += f" [{better.low:.2f}, {better.high:.2f}]: {verdict(better)}."
    gains = per_game_gains(a, b, study.games)
    for word, chosen in (
        ("won", [game for game in gains if gains[game] > 0]),
        ("lost", [game for game in gains if gains[game] < 0]),
        ("even", [game for game in gains if gains[game] == 0]),
    ):
        if chosen:
            ordered = sorted(chosen, key=lambda game: -abs(gains[game]))
            lines.append(f"{a.label} {word} {len(chosen)}: {', '.join(f'{g} {gains[g]:+,.0f}%' for g in ordered)}")
    lines.append(f"(percent of what {b.label} gains on random play)")
    return "\n".join([*lines, *([""] if study.notes else []), *study.notes])


def verdict(better: statistics.Interval) -> str:
    """In words, whether an interval of the probability of improvement lies on one side of a half."""
    if better.low > 0.5:
        return "the first is better, beyond the noise of the seeds"
    if better.high < 0.5:
        return "the second is better, beyond the noise of the seeds"
    return "these seeds do not tell them apart"
