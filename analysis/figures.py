"""The figures, in one style: black for the reference, colours that the colour-blind can tell apart, axes with units."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis import statistics
from analysis.results import CURVE_RESAMPLES, Results
from analysis.scores import Group, Run, read_random

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B"]  # Okabe and Ito's, and a brown
DASHES = ["-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1))]  # beyond seven settings, and in print
MARKERS = "osD^vP*X"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "small-batch",  # the same numbers give the same file
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a name may have dollars
}
DIAGNOSTICS = {
    "diagnostics/loss_variance": "variance of the loss",
    "diagnostics/gradient_norm": "gradient norm",
    "diagnostics/representation_norm": "representation norm",
    "diagnostics/srank": "srank",
    "diagnostics/dormant_neurons": "dormant neurons (share)",
    # of agents without a replay
    "diagnostics/feature_rank": "feature rank",
    "diagnostics/weight_norm": "weight norm",
    "diagnostics/gradient_kurtosis": "gradient kurtosis",
    "diagnostics/policy_variance": "policy variance",
    "diagnostics/churn": "churn",
    "diagnostics/effective_sample_size": "effective sample size",
}


def draw(results: Results) -> Iterator[tuple[str, str, Figure]]:
    """Yield (file name, title, figure) of every figure that these data allow."""
    with matplotlib.rc_context(STYLE | {"figure.constrained_layout.use": False}):  # _finished does it
        if len(results.frames) > 1:
            yield "curves", "Sample efficiency", curves(results)
        yield "intervals", "Aggregates", intervals(results)
        yield "profiles", "Performance profiles", profiles(results)
        for number, group in enumerate(results.others, 1):
            name = f"{number}_" + "".join(c if c.isalnum() else "_" for c in group.label)
            title = f"{group.label} against {results.reference.label}, game by game"
            yield f"gains_{name}", title, gains(results, group)
        if len(results.frames) > 1:
            yield "games", "Returns, game by game", games(results)
            if results.hours:
                yield "time", "IQM against wall-clock time", time(results)
        for number, name in enumerate(results.study.by):
            values = {group.key[number] for group in results.study.groups}
            if len(values) > 1 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
                yield f"sweep_{name}", f"IQM against {name.replace('_', ' ')}", sweep(results, number)
        if logged(results):
            yield "diagnostics", "Diagnostics", diagnostics(results)


@contextmanager
def _finished(figure: Figure, caption: str):
    """Put the caption under a figure once it is drawn, and everything in its place."""
    yield
    figure.supxlabel(textwrap.fill(caption, int(16 * figure.get_figwidth())), fontsize=7, color="0.35")
    ConstrainedLayoutEngine().execute(figure)  # once for all files, as it takes longer than the drawing


def _look(results: Results, group: Group) -> dict:
    """Colour, dash and marker of a group, the same in every figure."""
    if group is results.reference:
        return {"color": "black", "linestyle": "-", "marker": "o"}
    number = results.others.index(group)
    dash = DASHES[(number // len(COLOURS) + number % 2) % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dash, "marker": MARKERS[1 + number % 7]}


def _line(results: Results, group: Group) -> dict:
    look = _look(results, group)
    look.pop("marker")
    return look | {"label": group.label, "zorder": 3 if group is results.reference else 2}


def _band(results: Results, group: Group, axes, across: np.ndarray, found: statistics.Interval) -> None:
    """Draw a line, and its intervals as a band around it."""
    line, mark = _line(results, group), results.study.mark(group)
    axes.plot(across, found.point, **line | {"label": group.label + mark})
    axes.fill_between(across, found.low, found.high, **_filling(line["color"], 0.2, mark))


def _filling(colour: str, alpha: float, mark: str) -> dict:
    """How an interval is filled: it is hatched if it rests on too few runs."""
    filled = {"facecolor": colour, "alpha": alpha, "linewidth": 0}
    hatched = {"facecolor": "none", "edgecolor": colour, "alpha": 2 * alpha, "linewidth": 0, "hatch": "//////"}
    return hatched if mark else filled


def _legend(figure: Figure, axes) -> None:
    handles, labels = [found[::-1] for found in axes.get_legend_handles_labels()]  # drawn last: on top
    legend(figure, handles, labels)


def legend(figure: Figure, handles: list, labels: list[str]) -> None:
    """Name the lines above all panels, in as many columns as the longest name leaves room for."""
    inches = 0.6 + 0.066 * max(len(label) for label in labels)
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8)


def _plain_ticks(axes) -> None:
    """Label the ticks of a logarithmic axis with plain numbers: matplotlib's are mathtext, which STYLE turns off."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def frames_unit(frames: np.ndarray) -> tuple[float, str]:
    return (1e6, "emulator frames (millions)") if frames[-1] >= 2e6 else (1e3, "emulator frames (thousands)")


def curves(results: Results) -> Figure:
    """IQM against frames, with bands."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    scale, unit = frames_unit(results.frames)
    with _finished(figure, f"{results.caption} ({min(results.resamples, CURVE_RESAMPLES):,} resamples)"):
        for group in reversed(results.ordered):
            _band(results, group, axes, results.frames / scale, results.curves[group.label])
        axes.set_xlabel(unit)
        axes.set_ylabel(f"IQM of the {results.study.unit}")
        _legend(figure, axes)
    return figure


def time(results: Results) -> Figure:
    """IQM against hours of wall-clock time, mean over the runs."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    note = f"{results.caption} ({min(results.resamples, CURVE_RESAMPLES):,} resamples); hours: mean of the runs"
    with _finished(figure, note):
        for group in reversed(results.ordered):
            if (hours := results.hours.get(group.label)) is None:
                continue
            _band(results, group, axes, hours, results.curves[group.label])
        axes.set_xlabel("wall-clock time (hours)")
        axes.set_ylabel(f"IQM of the {results.study.unit}")
        _legend(figure, axes)
    return figure


def intervals(results: Results) -> Figure:
    """The four aggregates, a panel each, a bar for each setting's interval."""
    groups = results.ordered
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(groups)))
    metrics = results.study.metrics
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    gap = "; a smaller optimality gap is better" if "optimality_gap" in metrics else ""
    with _finished(figure, f"{results.caption} ({results.resamples:,} resamples){gap}"):
        for axes, name in zip(panels, metrics, strict=True):
            for place, group in enumerate(groups):
                found, colour = results.aggregates[group.label][name], _look(results, group)["color"]
                filling = _filling(colour, 0.4, results.study.mark(group))
                axes.barh(place, found.high - found.low, left=found.low, height=0.6, **filling)
                axes.plot([found.point] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
            axes.use_sticky_edges = False
            axes.margins(x=0.1)
            axes.set_title(statistics.METRICS[name].title, fontsize=9)
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(groups)), [group.label + results.study.mark(group) for group in groups])
        panels[0].set_ylim(len(groups) - 0.4, -0.6)
        for axes in panels:
            axes.set_xlabel(results.study.unit, fontsize=7)
    return figure


def profiles(results: Results) -> Figure:
    """Share of runs with more than a score, against the score."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    with _finished(figure, f"{results.caption} ({min(results.resamples, CURVE_RESAMPLES):,} resamples)"):
        for group in reversed(results.ordered):
            _band(results, group, axes, results.thresholds, results.profiles[group.label])
        axes.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")  # the median of all runs
        axes.set_xlabel(f"{results.study.unit} τ")
        axes.set_ylabel("share of runs with a score above τ")
        axes.set_ylim(0, 1)
        _legend(figure, axes)
    return figure


def gains(results: Results, group: Group) -> Figure:
    """Bars of the gain in every game, largest first; logarithmic where they span orders of magnitude."""
    gained = results.gains[group.label]
    found = sorted(((gain, game) for game, gain in gained.items() if math.isfinite(gain)), reverse=True)
    values = np.array([gain for gain, _ in found])
    figure = Figure(figsize=(max(5, 1.2 + 0.19 * len(found)), 3.6))
    axes = figure.add_subplot()
    note = f"{results.counted(results.study.games)}; gain in percent of the reference's own gain on random play"
    if endless := [game for game, gain in gained.items() if not math.isfinite(gain)]:
        note += f"; not drawn, as the reference gains nothing there: {', '.join(endless)}"
    random_play = read_random()
    if unknown := [game for game in gained if game not in random_play]:
        note += f"; random play counts as 0 in {', '.join(unknown)}"
    with _finished(figure, note):
        colours = np.where(values >= 0, COLOURS[0], COLOURS[1])
        axes.bar(range(len(found)), values, color=colours, width=0.8)
        axes.axhline(0, color="black", linewidth=0.8)
        size = np.abs(values[values != 0])
        if len(size) and size.max() / size.min() > 50:
            smallest = 10 ** math.floor(math.log10(np.quantile(size, 0.1)))
            axes.set_yscale("symlog", linthresh=max(1.0, smallest))
            _plain_ticks(axes)
        axes.set_xticks([])
        below = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
        for place, (_, game) in enumerate(found):  # texts are drawn in half the time of ticks
            axes.text(place, -0.02, game.removeprefix("MinAtar/"), rotation=90, fontsize=7, **below)
        axes.margins(y=0.08)
        axes.set_xlim(-0.7, len(found) - 0.3)
        axes.set_ylabel("gain (%)")
        won = sum(gain > 0 for gain in gained.values())
        mark = results.study.mark(group, results.reference)
        title = f"{group.label} over {results.reference.label}: better in {won} of {len(gained)}{mark}"
        axes.set_title(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=9)
    return figure


def games(results: Results) -> Figure:
    """A panel for each game: mean return of the seeds, and their range."""
    study = results.study
    columns = min(5, len(study.games))
    rows = math.ceil(len(study.games) / columns)
    figure = Figure(figsize=(max(6, 2.1 * columns), 0.9 + 1.7 * rows))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    scale, unit = frames_unit(study.frames)
    with _finished(figure, f"{results.counted(study.games)}; lines: mean, bands: smallest to largest. Across: {unit}"):
        for axes, game in zip(panels, study.games, strict=False):
            for group in reversed(results.ordered):
                raw, line = group.raw[game], _line(results, group)
                axes.plot(study.frames / scale, raw.mean(axis=0), **line | {"linewidth": 1.2})
                shade = {"color": line["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(study.frames / scale, raw.min(axis=0), raw.max(axis=0), **shade)
            axes.set_title(game.removeprefix("MinAtar/"), fontsize=8)
            axes.tick_params(labelsize=6)
        for axes in panels[len(study.games) :]:
            axes.set_visible(False)
        for row in range(rows):
            panels[row * columns].set_ylabel("return", fontsize=7)
        _legend(figure, panels[0])
    return figure


def sweep(results: Results, number: int) -> Figure:
    """IQM against the value by which the groups differ, a line for each combination of the others."""
    study, figure = results.study, Figure(figsize=(5, 3.6))
    axes = figure.add_subplot()
    lines: dict[tuple, list[Group]] = {}
    for group in study.groups:
        lines.setdefault((*group.key[:number], *group.key[number + 1 :]), []).append(group)
    names = [name.replace("_", " ") for name in study.by]
    with _finished(figure, f"{results.caption} ({results.resamples:,} resamples), at {study.frames[-1]:,} frames"):
        for place, (key, found) in enumerate(lines.items()):
            found = sorted(found, key=lambda group: group.key[number])
            shown = [results.aggregates[group.label]["iqm"] for group in found]
            points = np.array([float(x.point) for x in shown])
            ends = np.abs(np.array([[float(x.low), float(x.high)] for x in shown]).T - points)
            others = [name for i, name in enumerate(names) if i != number]
            label = ", ".join(str(v) if n == "agent" else f"{n} {v}" for n, v in zip(others, key, strict=True))
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % 8], "capsize": 3}
            axes.errorbar([group.key[number] for group in found], points, ends, label=label or None, **style)
            for group, interval in zip(found, shown, strict=True):
                axes.annotate(study.mark(group), (group.key[number], interval.high), color=style["color"])
        values = sorted({group.key[number] for group in study.groups})
        if values[0] > 0 and values[-1] / values[0] >= 4:
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
        axes.set_xlabel(names[number])
        axes.set_ylabel(f"IQM of the {study.unit}")
        if len(study.by) > 1:
            axes.legend(fontsize=8)
    return figure


def logged(results: Results) -> list[str]:
    """The diagnostics that some run has."""
    runs = [run for group in results.study.groups for found in group.runs.values() for run in found]
    return [tag for tag in DIAGNOSTICS if any(tag in run.series for run in runs)]


def diagnostics(results: Results) -> Figure:
    """Returns and diagnostics, a row for each game, mean of the seeds."""
    study = results.study
    tags = logged(results)
    columns = ["return", *[DIAGNOSTICS[tag] for tag in tags]]
    figure = Figure(figsize=(2.1 * len(columns), 0.9 + 1.6 * len(study.games)))
    panels = figure.subplots(len(study.games), len(columns), squeeze=False, sharex=True)
    scale, unit = frames_unit(study.frames)
    runs = {group.label: [run for found in group.runs.values() for run in found] for group in results.ordered}
    lacking = [label for label, found in runs.items() if not any(run.series for run in found)]
    note = f"{results.counted(study.games)}; lines: mean of the seeds. Across: {unit}"
    note += f". Without diagnostics: {'; '.join(lacking)}" if lacking else ""
    with _finished(figure, note):
        for row, game in zip(panels, study.games, strict=True):
            for group in reversed(results.ordered):
                line = _line(results, group) | {"linewidth": 1.1}
                row[0].plot(study.frames / scale, group.raw[game].mean(axis=0), **line)
                for axes, tag in zip(row[1:], tags, strict=True):
                    frames, values = mean_series(group.runs[game], tag, study.frames[-1])
                    axes.plot(frames / scale, values, **line)
            row[0].set_ylabel(game.removeprefix("MinAtar/"), fontsize=8)
            for axes in row:
                axes.tick_params(labelsize=6)
        for axes, title in zip(panels[0], columns, strict=True):
            axes.set_title(title, fontsize=8)
        for tag, axes in zip(["return", *tags], panels[0], strict=True):
            if tag in ("diagnostics/loss_variance", "diagnostics/gradient_norm"):
                for lower in panels[:, list(panels[0]).index(axes)]:
                    if not any((line.get_ydata() > 0).any() for line in lower.lines):
                        continue  # runs too short for a report, or zeros
                    lower.set_yscale("log")
                    lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # so that less than a decade has a label
                    _plain_ticks(lower)
        _legend(figure, panels[0, 0])
    return figure


def mean_series(runs: list[Run], tag: str, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames that all runs reported a diagnostic at, to `last`, and the mean of the values there, (points,) both."""
    known = [run for run in runs if tag in run.series]
    if not known:
        return np.zeros(0), np.zeros(0)
    tables = []
    for run in known:
        series = run.series[tag]
        tables.append(dict(zip((series.steps * run.frames_per_step).tolist(), series.values.tolist(), strict=True)))
    frames = sorted(frames for frames in set(tables[0]).intersection(*tables[1:]) if frames <= last)
    return np.array(frames), np.array([np.mean([table[at] for table in tables]) for at in frames])


def contribution(gammas: Iterable[float], steps: int) -> Figure:
    """What a reward counts for when it is t steps away, gamma^t, and in how many steps that has fallen to 1 / e."""
    ahead = np.arange(steps + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.4))
        axes = figure.subplots()
        for gamma, colour in zip(sorted(gammas), itertools.cycle(COLOURS), strict=False):
            weights = float(gamma) ** ahead
            axes.plot(ahead, weights, color=colour, label=f"gamma = {gamma:g}")
            below = np.flatnonzero(weights < math.exp(-1))
            if len(below):
                axes.plot(below[0], weights[below[0]], "o", color=colour, markersize=4)
                axes.annotate(f"{below[0]}", (below[0], weights[below[0]]), (4, 4), textcoords="offset points")
        axes.set_xlabel("agent steps ahead, t")
        axes.set_ylabel("share of a reward in the value, gamma^t")
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, steps)
        axes.legend()
        figure.supxlabel("Points: the first step at which less than 1 / e is left.", fontsize=7, color="0.35")
        figure.canvas.draw()
    return figure
