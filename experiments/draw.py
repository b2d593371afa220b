"""Draw a figure from the runs that are there: a panel for each agent, a colour for each batch size."""

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from analysis import figures, statistics
from analysis.compare import verdict
from analysis.results import compute
from analysis.runs import BadInput
from analysis.scores import Group, Study, make_study
from experiments.figures import Figure
from experiments.plan import Run, games_of, make_run, seeds_of, settings_of
from experiments.record import Record, curve_of

COLOURS = {8: "#0072B2", 16: "#009E73", 32: "black", 64: "#D55E00"}  # of batch sizes
OTHERS = ["black", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00"]  # of other values, in their order
USUAL = 32  # the batch size that others are compared with
RESAMPLES = 2_000


@dataclass
class Panel:
    """A part of a figure: runs that differ in the value of its line, the game and the seed alone."""

    title: str
    study: Study
    reference: Group  # batch size 32, or the first value

    def colour(self, group: Group) -> str:
        (value,) = group.key
        if self.study.by == ["batch_size"] and value in COLOURS:
            return COLOURS[value]
        return OTHERS[self.study.groups.index(group) % len(OTHERS)]


def find_runs(figure: Figure, scale: str, overrides: dict, folder: Path, record: Record) -> tuple[list, list[Run]]:
    """The finished runs of a figure, as (setting, curve), and the runs that are missing."""
    found, missing = [], []
    for seed in seeds_of(figure, scale):
        for game, setting in product(games_of(figure, scale), settings_of(figure, scale)):
            run = make_run(figure, setting, game, seed, scale, overrides)
            result = run.result(folder)
            if result:
                found.append((setting, curve_of(run, result, folder / "cache")))
            elif run in record:
                found.append((setting, record.curve(run)))
            else:
                missing.append(run)
    return found, missing


def make_panels(figure: Figure, found: list, scale: str) -> list[Panel]:
    """Raises BadInput where nothing can be drawn yet."""
    together: dict[tuple, list] = {}
    for setting, curve in found:
        key = tuple(setting[name] for name in figure.panels)
        curve.settings = {figure.line: setting[figure.line]}  # what else differs is a panel, or the game
        together.setdefault(key, []).append(curve)
    panels = []
    for key, curves in together.items():
        named = zip(figure.panels, key, strict=True)
        plain = ("agent", "variant", "network", "algorithm")  # names that speak for themselves
        title = ", ".join(str(v) if n in plain else f"{n.replace('_', ' ')} {v}" for n, v in named)
        panels.append(make_panel(title, curves, figure.line, scale))
    return panels


def make_panel(title: str, curves: list, line: str, scale: str) -> Panel:
    """Scores are human-normalised on Atari; elsewhere 1 is what the reference scores in the end, 0 random play."""
    values = sorted({curve.settings[line] for curve in curves})
    usual = USUAL if line == "batch_size" and USUAL in values else values[0]
    label = f"{line.replace('_', ' ')} {usual}"
    try:
        study = make_study(curves, [line], "human" if scale == "paper" else f"baseline:{label}")
    except BadInput:  # no better than random play
        study = make_study(curves, [line], "none")
    (reference,) = [group for group in study.groups if group.key == (usual,)]
    return Panel(title, study, reference)


# ---- the kinds of figures
def draw(name: str, figure: Figure, panels: list[Panel], planned: int, there: int):
    """Return the Matplotlib figure of a figure of the study."""
    with matplotlib.rc_context(figures.STYLE):
        drawn = KINDS[figure.draw](figure, panels)
        few = any(panel.study.mark(*panel.study.groups) for panel in panels)
        caption = f"{name}: {there} of {planned} runs, {panels[0].study.seeds} a game"
        caption += f" (fewer than {statistics.ENOUGH_RUNS}: too few to tell)" if few else ""
        caption += "; bands: 95% stratified bootstrap intervals"
        drawn.supxlabel(textwrap.fill(caption, int(16 * drawn.get_figwidth())), fontsize=7, color="0.35")
    return drawn


def grid(count: int, columns: int, width: float, height: float, same_scale: bool = False):
    """A figure and its panels, row by row."""
    rows = math.ceil(count / columns)
    drawn = plt.figure(figsize=(width * columns + 0.6, height * rows + 0.9))
    axes = drawn.subplots(rows, columns, squeeze=False, sharey=same_scale).ravel()
    for spare in axes[count:]:
        spare.set_visible(False)
    return drawn, axes


def legend(drawn, axes):
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)


def curves(figure: Figure, panels: list[Panel], time: bool = False):
    """IQM of all games against frames, or hours: a panel for each agent or other setting."""
    columns = len({panel.title.split(", ")[-1] for panel in panels}) if len(figure.panels) > 1 else len(panels)
    drawn, axes = grid(len(panels), min(columns, 4), 2.5, 2.4, same_scale=True)
    rng = np.random.default_rng(0)
    for panel, place in zip(panels, axes, strict=False):
        study = panel.study
        scale, unit = figures._frames_unit(study.frames)
        for group in study.groups:
            strata = [group.normalised[game] for game in study.scored]
            found = statistics.estimate(strata, rng, ["iqm"], RESAMPLES)["iqm"]
            across = study.frames / scale
            if time and group.hours:
                across = np.concatenate([group.hours[game] for game in study.scored]).mean(axis=0)
            colour = panel.colour(group)
            place.plot(across, found.point, color=colour, label=group.label)
            place.fill_between(across, found.low, found.high, color=colour, alpha=0.2, linewidth=0)
        place.set_title(panel.title, fontsize=9)
        place.set_xlabel("wall-clock time (hours)" if time else unit, fontsize=7)
        place.tick_params(labelsize=7)
    axes[0].set_ylabel(f"IQM of the {study.unit}", fontsize=7)
    legend(drawn, axes[0])
    return drawn


def time(figure: Figure, panels: list[Panel]):
    """IQM against hours, mean over the runs."""
    return curves(figure, panels, time=True)


def games(figure: Figure, panels: list[Panel]):
    """Returns game by game: mean of the seeds, and the smallest and largest."""
    places = [(panel, game) for panel in panels for game in panel.study.games]
    drawn, axes = grid(len(places), min(5, len(places)), 2.1, 1.7)
    for (panel, game), place in zip(places, axes, strict=False):
        scale, unit = figures._frames_unit(panel.study.frames)
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
    legend(drawn, axes[0])
    return drawn


def gains(figure: Figure, panels: list[Panel]):
    """Bars of what the smallest value gains over the reference in every game."""
    (panel,) = panels
    results = compute(panel.study, panel.reference.label, RESAMPLES, np.random.default_rng(0))
    return figures.gains(results, results.others[0])


def diagnostics(figure: Figure, panels: list[Panel]):
    """Returns and diagnostics, a row for each game."""
    (panel,) = panels
    return figures.diagnostics(compute(panel.study, panel.reference.label, RESAMPLES, np.random.default_rng(0)))


KINDS = {"curves": curves, "time": time, "games": games, "gains": gains, "diagnostics": diagnostics}


# ---- in words
def sentences(panels: list[Panel]) -> Iterator[str]:
    """What the figure says of the smallest value beside the reference: a sentence for each panel."""
    rng = np.random.default_rng(0)
    for panel in panels:
        study, usual = panel.study, panel.reference
        other = study.groups[0]
        if other is usual:
            continue
        found = statistics.probability_of_improvement(other.strata(study.scored), usual.strata(study.scored), rng)
        what = f"{panel.title}: a run with {other.label} beats one with {usual.label} on the same game"
        chance = f"with probability {found.point:.2f} [{found.low:.2f}, {found.high:.2f}]"
        words = verdict(study, other, usual, found).replace("the first", other.label).replace("the second", usual.label)
        yield f"{what} {chance} ({len(study.scored)} games, {study.seeds}): {words}."


def list_missing(missing: list[Run], most: int = 10) -> str:
    names = ", ".join(run.name for run in missing[:most])
    return names + (f" and {len(missing) - most:,} more" if len(missing) > most else "")


def figure(name: str, asked: Figure, scale: str, overrides: dict, folder: Path, record: Record, out: Path):
    """Draw a figure as PNG and SVG, and say what it shows and what is missing. Raises BadInput if nothing is there."""
    found, missing = find_runs(asked, scale, overrides, folder, record)
    if not found:
        raise BadInput(f"none of its {len(missing)} runs is finished.")
    panels = make_panels(asked, found, scale)
    drawn = draw(name, asked, panels, len(found) + len(missing), len(found))
    out.mkdir(parents=True, exist_ok=True)
    for kind, facts in (("png", {}), ("svg", {"metadata": {"Date": None}})):
        drawn.savefig(out / f"{name}.{kind}", **facts)
    plt.close(drawn)
    print(f"{out / name}.png: {asked.asks}")
    for sentence in sentences(panels):
        print(f"  {sentence}")
    if missing:
        print(f"  missing are {len(missing):,} of {len(found) + len(missing):,} runs: {list_missing(missing)}")
