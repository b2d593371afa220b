"""Two settings side by side, in plain words."""

import numpy as np

from analysis import statistics
from analysis.results import find_group, per_game_gains
from analysis.runs import BadInput
from analysis.scores import Group, Study, read_random


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
            ends = f"[{point.low:.3f}, {point.high:.3f}]{study.mark(group)}"
            lines.append(f"{title:15} {group.label:{width}}  {point.point:9.3f}   {ends}")
    lines += ["", f"A run of {a.label} beats one of {b.label} on the same game with probability {better.point:.2f}"]
    lines[-1] += f" [{better.low:.2f}, {better.high:.2f}]{study.mark(a, b)}: {verdict(study, a, b, better)}."
    gains = per_game_gains(a, b, study.games)
    for word, chosen in (
        ("won", [game for game in gains if gains[game] > 0]),
        ("lost", [game for game in gains if gains[game] < 0]),
        ("even", [game for game in gains if gains[game] == 0]),
    ):
        if chosen:
            ordered = sorted(chosen, key=lambda game: -abs(gains[game]))
            lines.append(f"{a.label} {word} {len(chosen)}: {', '.join(f'{g} {gains[g]:+,.0f}%' for g in ordered)}")
    random_play = read_random()
    unknown = [game for game in gains if game not in random_play]
    zero = f"; random play counts as 0 in {', '.join(unknown)}" if unknown else ""
    lines.append(f"(percent of what {b.label} gains on random play{zero})")
    return "\n".join([*lines, *([""] if study.notes else []), *study.notes])


def verdict(study: Study, a: Group, b: Group, better: statistics.Interval) -> str:
    """Say whether the interval of the probability of improvement lies on one side of a half, if the runs are enough."""
    if study.mark(a, b):
        counts = f"{study.fewest(a)} of {a.label} and {study.fewest(b)} of {b.label} in the game that has fewest"
        return f"there are too few runs to tell ({counts}; it takes at least {statistics.ENOUGH_RUNS} of each)"
    if better.low > 0.5:
        return "the first is better, beyond the noise of the seeds"
    if better.high < 0.5:
        return "the second is better, beyond the noise of the seeds"
    return "these seeds do not tell them apart"
