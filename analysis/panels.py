"""Figures in panels: one for each agent or other setting, and in it a line for each value of one flag.

The colours of batch sizes are the same everywhere, black for 32, the study's default.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis import figures, statistics
from analysis.compare import verdict
from analysis.results import compute
from analysis.runs import BadInput
from analysis.scores import Group, Run, Study, label_of, make_study, means_of_parts

COLOURS = {8: "#0072B2", 16: "#D55E00", 32: "black", 64: "#009E73"}  # of batch sizes, as in analysis.figures
OTHERS = ["black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]  # of other values, in their order
USUAL = 32  # the batch size that others are compared with
RESAMPLES = 2_000
MEASURES = (  # of agents without a replay, which log them; PQN has no effective sample size
    *("feature_rank", "dormant_neurons", "weight_norm", "gradient_kurtosis"),
    *("policy_variance", "effective_sample_size"),
)
TWENTIETHS = 20  # of a run, a point each


@dataclass
class Panel:
    """A part of a figure: runs that differ in the value of its line, the game and the seed alone."""

    title: str
    study: Study
    reference: Group  # batch size 32, or the first value
    values: list  # of the line, whether or not there are runs of each yet

    @property
    def few(self) -> bool:
        """Whether there are too few runs to tell."""
        return bool(self.study.mark(*self.study.groups))

    @property
    def groups(self) -> list[Group]:
        """The lines, in the order of their values."""
        return sorted(self.study.groups, key=lambda group: self.values.index(*group.key))

    def colour(self, group: Group) -> str:
        (value,) = group.key
        if self.study.by == ["batch_size"] and value in COLOURS:
            return COLOURS[value]
        return OTHERS[self.values.index(value) % len(OTHERS)]


def make_panel(title: str, curves: list[Run], line: str, values: list) -> Panel:
    """Scores are human-normalised on Atari; on MinAtar 1 is what the reference scores in the end, 0 random play.

    Raises BadInput if there is no run of the reference, or no game that all have.
    """
    usual = USUAL if line == "batch_size" and USUAL in values else values[0]
    label = label_of([line], (usual,))
    if all(curve.settings[line] != usual for curve in curves):
        raise BadInput(f"no run with {label}, which others are compared with, is finished.")
    minatar = curves[0].game.startswith("MinAtar/")
    try:
        study = make_study(curves, [line], f"baseline:{label}" if minatar else "human")
    except BadInput:  # no better than random play
        study = make_study(curves, [line], "none")
    (reference,) = [group for group in study.groups if group.key == (usual,)]
    return Panel(title, study, reference, values)


def grid(count: int, columns: int, width: float, height: float, same_scale: bool = False):
    """A figure and its panels, row by row."""
    if count == 1:
        width, height = 2 * width, 1.4 * height
    rows = math.ceil(count / columns)
    drawn = Figure(figsize=(width * columns + 0.6, height * rows + 0.9))
    axes = drawn.subplots(rows, columns, squeeze=False, sharey=same_scale).ravel()
    for spare in axes[count:]:
        spare.set_visible(False)
    return drawn, axes


def legend(drawn, axes):
    """One legend for all panels."""
    named = {}
    for place in axes:
        handles, labels = place.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figures.legend(drawn, list(named.values()), list(named.keys()))


def curves(panels: list[Panel], columns: int, time: bool = False) -> Figure:
    """IQM of all games against frames, or hours."""
    units = {panel.study.unit for panel in panels}
    drawn, axes = grid(len(panels), columns, 2.5, 2.4, same_scale=len(units) == 1)
    rng = np.random.default_rng(0)
    for panel, place in zip(panels, axes, strict=False):
        study = panel.study
        scale, unit = figures.frames_unit(study.frames)
        for group in panel.groups:
            strata = [group.normalised[game] for game in study.scored]
            found = statistics.estimate(strata, rng, ["iqm"], RESAMPLES)["iqm"]
            across = study.frames / scale
            if time:
                if group.hours is None:
                    raise BadInput(f"the hours of {panel.title}, {group.label}, are not known: a record has none.")
                across = np.concatenate([group.hours[game] for game in study.scored]).mean(axis=0)
            colour = panel.colour(group)
            place.plot(across, found.point, color=colour, label=group.label)
            place.fill_between(across, found.low, found.high, color=colour, alpha=0.2, linewidth=0)
        if place is axes[0] or len(units) > 1:
            place.set_ylabel(f"IQM of the {study.unit}", fontsize=7)
        place.set_title(panel.title, fontsize=9)
        place.set_xlabel("wall-clock time (hours)" if time else unit, fontsize=7)
        place.tick_params(labelsize=7)
    drawn.supxlabel("bands: 95% stratified bootstrap intervals")
    legend(drawn, axes)
    return drawn


def time(panels: list[Panel], columns: int) -> Figure:
    """IQM against hours, mean over the runs."""
    return curves(panels, columns, time=True)


def games(panels: list[Panel], columns: int) -> Figure:
    """Returns game by game: mean of the seeds, and the smallest and largest."""
    places = [(panel, game) for panel in panels for game in panel.study.games]
    drawn, axes = grid(len(places), min(5, len(places)), 2.1, 1.7)
    for (panel, game), place in zip(places, axes, strict=False):
        scale, unit = figures.frames_unit(panel.study.frames)
        for group in panel.study.groups:
            raw, colour = group.raw[game], panel.colour(group)
            across = panel.study.frames / scale
            place.plot(across, raw.mean(axis=0), color=colour, linewidth=1.2, label=group.label)
            place.fill_between(across, raw.min(axis=0), raw.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        title = game.removeprefix("MinAtar/")
        place.set_title(title if len(panels) == 1 else f"{panel.title}: {title}", fontsize=8)
        place.tick_params(labelsize=6)
    axes[0].set_ylabel("return", fontsize=7)
    axes[0].set_xlabel(unit, fontsize=6)
    drawn.supxlabel("lines: mean of the seeds, bands: smallest to largest")
    legend(drawn, axes)
    return drawn


def gains(panels: list[Panel], columns: int) -> Figure:
    """Bars of what the smallest value gains over the reference in every game."""
    (panel,) = panels
    results = compute(panel.study, panel.reference.label, RESAMPLES, np.random.default_rng(0))
    if not results.others:
        raise BadInput(f"there is nothing to compare with {panel.reference.label} yet.")
    return figures.gains(results, results.others[0])


def diagnostics(panels: list[Panel], columns: int) -> Figure:
    """Returns and diagnostics, a row for each game."""
    (panel,) = panels
    return figures.diagnostics(compute(panel.study, panel.reference.label, RESAMPLES, np.random.default_rng(0)))


def measured(panel: Panel, group: Group, measure: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Steps, and each game's runs (runs, steps): means of a diagnostic in every twentieth that all runs have."""
    last = panel.study.frames[-1]
    strata = []
    for game in panel.study.scored:
        rows = []
        for run in group.runs[game]:
            series = run.series.get(f"diagnostics/{measure}")
            if series is None:
                return np.zeros(0), []
            frames = series.steps * run.frames_per_step
            rows.append(means_of_parts(frames, series.values, last / TWENTIETHS, TWENTIETHS))
        strata.append(np.array(rows))
    known = ~np.isnan(np.concatenate(strata)).any(axis=0)
    ends = last * np.arange(1, TWENTIETHS + 1) / TWENTIETHS
    return ends[known], [rows[:, known] for rows in strata]


def measures(panels: list[Panel], columns: int) -> Figure:
    """A row of scores and one of each measure of the network, a column for each panel."""
    drawn = Figure(figsize=(3.1 * len(panels) + 0.6, 1.5 * (len(MEASURES) + 1) + 0.9))
    axes = drawn.subplots(len(MEASURES) + 1, len(panels), squeeze=False, sharex=True, sharey="row")
    rng = np.random.default_rng(0)
    for column, panel in zip(axes.T, panels, strict=True):
        study = panel.study
        scale, unit = figures.frames_unit(study.frames)
        for group in panel.groups:
            lines = [(study.frames, [group.normalised[game] for game in study.scored])]
            lines += [measured(panel, group, measure) for measure in MEASURES]
            for place, (across, strata) in zip(column, lines, strict=True):
                if len(across) == 0:
                    continue
                found = statistics.estimate(strata, rng, ["iqm"], RESAMPLES)["iqm"]
                colour = panel.colour(group)
                place.plot(across / scale, found.point, color=colour, label=group.label)
                place.fill_between(across / scale, found.low, found.high, color=colour, alpha=0.2, linewidth=0)
        column[0].set_title(panel.title, fontsize=9)
        column[-1].set_xlabel(unit, fontsize=7)
        for place in column:
            place.tick_params(labelsize=7)
            if not place.lines:
                place.text(0.5, 0.5, "it has none", transform=place.transAxes, ha="center", fontsize=7, color="0.4")
    titles = [figures.DIAGNOSTICS[f"diagnostics/{measure}"] for measure in MEASURES]
    for place, title in zip(axes[:, 0], [panels[0].study.unit, *titles], strict=True):
        place.set_ylabel(title, fontsize=7)
    drawn.supxlabel("IQM of all runs; bands: 95% stratified bootstrap intervals")
    legend(drawn, axes[0])
    return drawn


def measures_table(panels: list[Panel]) -> Iterator[str]:
    """The last scores and the measures' means over the second half, as a Markdown table: IQM and interval."""
    names = ["score", *[figures.DIAGNOSTICS[f"diagnostics/{measure}"] for measure in MEASURES]]
    yield f"| agent | games x steps | runs | {' | '.join(names)} |"
    yield "|-" * (len(names) + 3) + "|"
    rng = np.random.default_rng(0)
    for panel in panels:
        for group in panel.groups:
            lines = [group.strata(panel.study.scored)]
            for measure in MEASURES:
                across, strata = measured(panel, group, measure)
                late = across > panel.study.frames[-1] / 2
                lines.append([rows[:, late].mean(axis=1) for rows in strata])
            cells = []
            for strata in lines:
                if not strata:
                    cells.append("")
                    continue
                found = statistics.estimate(strata, rng, ["iqm"], RESAMPLES)["iqm"]
                cells.append(f"{found.point:.3g} [{found.low:.3g}, {found.high:.3g}]")
            runs = sum(len(group.runs[game]) for game in panel.study.scored)
            yield f"| {panel.title} | {group.label} | {runs} | {' | '.join(cells)} |"


def table(panels: list[Panel]) -> Iterator[str]:
    """The last scores of a figure as a Markdown table: IQM, its interval, and what it rests on."""
    yield "| panel | setting | IQM | 95% interval | games | runs of each |"
    yield "|-|-|-|-|-|-|"
    rng = np.random.default_rng(0)
    for panel in panels:
        study = panel.study
        for group in panel.groups:
            found = statistics.estimate(group.strata(study.scored), rng, ["iqm"], RESAMPLES)["iqm"]
            runs = [len(group.runs[game]) for game in study.scored]
            counted = f"{min(runs)} to {max(runs)}" if min(runs) < max(runs) else str(runs[0])
            ends = f"{found.low:.2f} to {found.high:.2f}{study.mark(group)}"
            yield f"| {panel.title} | {group.label} | {found.point:.2f} | {ends} | {len(runs)} | {counted} |"


def mark_steps(drawn: Figure, frames: np.ndarray, steps: list[int], frames_per_step: int):
    """Draw a line in every panel at these agent steps; `frames` are those of the curves."""
    scale, _ = figures.frames_unit(frames)
    for place in drawn.axes:
        for step in steps:
            place.axvline(step * frames_per_step / scale, color="0.3", linestyle=":", linewidth=1.1, zorder=1)


def sentences(panels: list[Panel]) -> Iterator[str]:
    """What the figure says of every other value beside the reference: a sentence each."""
    rng = np.random.default_rng(0)
    pairs = [(panel, group) for panel in panels for group in panel.groups if group is not panel.reference]
    for panel, other in pairs:
        study, usual = panel.study, panel.reference
        found = statistics.probability_of_improvement(other.strata(study.scored), usual.strata(study.scored), rng)
        what = f"{panel.title}: a run with {other.label} beats one with {usual.label} on the same game"
        counted = f"{len(study.scored)} game{'s' * (len(study.scored) != 1)}"
        chance = f"with probability {found.point:.2f} [{found.low:.2f}, {found.high:.2f}]"
        words = verdict(study, other, usual, found).replace("the first", other.label).replace("the second", usual.label)
        yield f"{what} {chance} ({counted}, {study.seeds}): {words}."
