"""Two settings side by side, in plain words."""

import numpy as np

from analysis import statistics
from analysis.results import find_group, per_game_gains
from analysis.runs import BadInput
from analysis.scores import Study, read_random


def compare(study: Study, first: str, second: str, resamples: int, rng: np.random.Generator) -> str:
    """Return the text that compares two settings of a study. Raises BadInput if they are not two of its settings."""
    a, b = find_group(study.groups, first), find_group(study.groups, second)
    if a is b:
        raise BadInput(f"{first!r} and {second!r} are the same setting, {a.label}.")
    games, streams = study.scored, rng.spawn(3)
    ours, theirs = a.strata(games), b.strata(games)
    found = [statistics.estimate(x, streams.pop(), study.metrics, resamples) for x in (ours, theirs)]
    better = statistics.probability_of_improvement(ours, theirs, streams.pop(), resamples)
    width = max(len(group.label) for group in (a, b))
    counted = f"{len(games)} game{'s' * (len(games) != 1)}, {study.seeds}, {study.frames[-1]:,} frames"
    lines = [f"{study.unit} ({counted})", ""]
    for name in study.metrics:
        for group, interval in zip((a, b), found, strict=True):
            point = interval[name]
            title = statistics.METRICS[name].title if group is a else ""
            lines.append(f"{title:15} {group.label:{width}}  {point.point:9.3f}   [{point.low:.3f}, {point.high:.3f}]")
    lines += ["", f"A run of {a.label} beats one of {b.label} on the same game with probability {better.point:.2f}"]
    single = any(len(scores) == 1 for scores in (*ours, *theirs))
    lines[-1] += f" [{better.low:.2f}, {better.high:.2f}]: {verdict(better, single)}."
    gains = per_game_gains(a, b, study.games)
    for word, chosen in (
        ("won", [game for game in gains if gains[game] > 0]),
        ("lost", [game for game in gains if gains[game] < 0]),
        ("even", [game for game in gains if gains[game] == 0]),
    ):
        if chosen:
            ordered = sorted(chosen, key=lambda game: -abs(gains[game]))
            lines.append(f"{a.label} {word} {len(chosen)}: {', '.join(f'{g} {gains[g]:+,.0f}%' for g in ordered)}")
    unknown = [game for game in gains if game not in read_random()]
    zero = f"; random play counts as 0 in {', '.join(unknown)}" if unknown else ""
    lines.append(f"(percent of what {b.label} gains on random play{zero})")
    return "\n".join([*lines, *([""] if study.notes else []), *study.notes])


def verdict(better: statistics.Interval, single: bool) -> str:
    """In words, whether an interval of the probability of improvement lies on one side of a half."""
    if single:  # the interval knows nothing of its spread
        return "a game with a single seed does not tell how much of that is noise"
    if better.low > 0.5:
        return "the first is better, beyond the noise of the seeds"
    if better.high < 0.5:
        return "the second is better, beyond the noise of the seeds"
    return "these seeds do not tell them apart"
