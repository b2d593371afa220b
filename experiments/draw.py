"""Draw a figure from the runs that are there, and say which are missing."""

import textwrap
from itertools import product
from pathlib import Path

import matplotlib

from analysis import figures, panels, statistics
from analysis.runs import BadInput
from experiments.figures import Figure
from experiments.plan import Run, runs_of, values_of
from experiments.record import POINTS, Record, curve_of

PLAIN = ("agent", "variant", "network", "algorithm")  # values that speak for themselves


def find_runs(figure: Figure, scale: str, overrides: dict, folder: Path, record: Record) -> tuple[list, list[Run]]:
    """The finished runs of a figure, as (setting, curve), and the runs that are missing."""
    found, missing = [], []
    for setting, run in runs_of(figure, scale, overrides):
        result = run.result(folder)
        if result:
            steps = min(run.steps // POINTS, 250_000)  # the study's iteration, or less of a short run
            found.append((setting, curve_of(run, result, steps, folder / "cache")))
        elif run in record:
            found.append((setting, record.curve(run)))
        else:
            missing.append(run)
    return found, missing


def make_panels(figure: Figure, found: list, values: dict[str, tuple]) -> list[panels.Panel]:
    """The panels that can be drawn; says why others cannot."""
    together: dict[tuple, list] = {}
    for setting, curve in found:
        key = tuple(setting[name] for name in figure.panels)
        curve.settings = {figure.line: setting[figure.line]}  # what else varies is a panel: check_figure
        together.setdefault(key, []).append(curve)
    made = []
    for key in product(*[values[name] for name in figure.panels]):  # row by row
        if key not in together:
            continue
        words = []
        for name, value in zip(figure.panels, key, strict=True):
            words.append(str(value) if name in PLAIN else f"{name.replace('_', ' ')} {value}")
        title = ", ".join(words)
        try:
            made.append(panels.make_panel(title, together[key], figure.line, list(values[figure.line])))
        except BadInput as error:
            print(f"  {title} is left out: {error}")
    return made


def draw(name: str, asked: Figure, scale: str, overrides: dict, folder: Path, record: Record, out: Path):
    """Write a figure as PNG and SVG, its last scores as a table, and say what it shows and what is missing.

    Raises BadInput if nothing is there.
    """
    found, missing = find_runs(asked, scale, overrides, folder, record)
    planned = len(found) + len(missing)
    if not found:
        raise BadInput(f"none of its {planned:,} runs is finished.")
    values = values_of(asked, scale)
    made = make_panels(asked, found, values)
    if not made:
        raise BadInput(f"{len(found):,} of its {planned:,} runs are finished, too few for a comparison.")
    columns = min(len(values[asked.panels[-1]]), len(made), 4)
    with matplotlib.rc_context(figures.STYLE):
        drawn = getattr(panels, asked.draw)(made, columns)
        if asked.marks and scale != "smoke":
            panels.mark_steps(drawn, made[0].study.frames, asked.marks, 4 if scale == "paper" else 1)
            drawn.supxlabel(f"{drawn.get_supxlabel()}; dotted lines: resets")
        few = (
            f", fewer than {statistics.ENOUGH_RUNS} of a game, too few to tell"
            if any(panel.few for panel in made)
            else ""
        )
        caption = f"{name}: {len(found):,} of {planned:,} runs{few}"
        caption = textwrap.fill(f"{caption}; {drawn.get_supxlabel()}", int(16 * drawn.get_figwidth()))
        drawn.supxlabel(caption, fontsize=7, color="0.35")
        out.mkdir(parents=True, exist_ok=True)
        for kind, facts in (("png", {}), ("svg", {"metadata": {"Date": None}})):
            drawn.savefig(out / f"{name}.{kind}", **facts)

    table = panels.measures_table if asked.draw == "measures" else panels.table
    (out / f"{name}.md").write_text("\n".join(table(made)) + "\n")

    print(f"{out / name}.png: {asked.asks}")
    for sentence in panels.sentences(made):
        print(f"  {sentence}")
    for note in dict.fromkeys(note for panel in made for note in panel.study.notes):
        if "left out of" in note.lower():  # a game
            print(f"  {note}")
    if missing:
        names = ", ".join(run.name for run in missing[:5])
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        print(f"  missing are {len(missing):,} of {planned:,} runs: {names}{more}")
