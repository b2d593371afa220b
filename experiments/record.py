"""A record: a line for each run that is finished, kept when the run folders are not.

Beside <name>.csv, <name>_diagnostics.csv has a line for each of a run's diagnostics.
"""

import csv
import json
import shlex
from collections import defaultdict
from pathlib import Path

import numpy as np

from analysis.runs import BadInput, Series, read_folder
from analysis.scores import Run as Curve
from analysis.scores import means_of_parts, run_of, short_name
from experiments.plan import Export, Run

POINTS = 20  # scores of a run: mean returns of the training games that ended in each twentieth
SCORES = [f"score_{number}" for number in range(1, POINTS + 1)]
COLUMNS = ["agent", "game", "seed", "setting", "steps", *SCORES, "commit", "command"]
VALUES = [f"value_{number}" for number in range(1, POINTS + 1)]  # of a diagnostic: means in each twentieth
MEASURED = ["command", "diagnostic", *VALUES]


class Record:
    """A CSV file, or nothing if there is no path. Raises BadInput if the file is no record."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[str, dict] = {}  # by the run's command
        self.measured: dict[str, list[dict]] = defaultdict(list)  # by the same
        if path is None:
            return
        self.beside = path.with_name(f"{path.stem}_diagnostics.csv")
        self.rows = {row["command"]: row for row in read_rows(path, COLUMNS)}
        for row in read_rows(self.beside, MEASURED):
            self.measured[row["command"]].append(row)

    def __contains__(self, item: Run | Export) -> bool:
        return isinstance(item, Run) and shown_command(item) in self.rows

    def add(self, run: Run, folder: Path):
        """Add the line of a run that is finished."""
        if self.path is None:
            return
        result = run.result(folder)
        each = run.steps // POINTS
        curve = curve_of(run, result, each)
        scores = dict(zip((curve.frames // curve.frames_per_step).tolist(), curve.scores.tolist(), strict=True))
        points = [round(scores[number * each], 4) if number * each in scores else "" for number in range(1, POINTS + 1)]
        commit = json.loads((result / "args.json").read_text())["git_commit"] or ""
        command = shown_command(run)
        measured = []
        for tag, series in curve.series.items():
            found = means_of_parts(series.steps, series.values, each, POINTS)
            values = [f"{value:.6g}" if np.isfinite(value) else "" for value in found]
            measured.append([command, tag.removeprefix("diagnostics/"), *values])
        add_rows(self.beside, MEASURED, measured)
        self.measured[command] = [dict(zip(MEASURED, row, strict=True)) for row in measured]

        values = [run.agent, run.env_id, run.seed, run.exp_name, run.steps, *points, commit, command]
        add_rows(self.path, COLUMNS, [values])
        self.rows[command] = dict(zip(COLUMNS, map(str, values), strict=True))

    def curve(self, run: Run) -> Curve:
        """A line as analysis has runs."""
        row = self.rows[shown_command(run)]
        numbers = [number for number in range(1, POINTS + 1) if row[f"score_{number}"]]
        frames_per_step = 4 if run.env_id.startswith("ALE/") else 1
        frames = np.array(numbers) * (run.steps // POINTS) * frames_per_step
        scores = np.array([float(row[f"score_{number}"]) for number in numbers])
        series = {}
        for row in self.measured[shown_command(run)]:
            known = [number for number in range(1, POINTS + 1) if row[f"value_{number}"]]
            steps = np.array(known) * (run.steps // POINTS)
            values = np.array([float(row[f"value_{number}"]) for number in known])
            series[f"diagnostics/{row['diagnostic']}"] = Series(steps, values, np.zeros(len(known)))
        return Curve(
            run.agent,
            short_name(run.env_id),
            run.seed,
            frames,
            scores,
            run.name,
            series=series,
            frames_per_step=frames_per_step,
        )


def read_rows(path: Path, columns: list[str]) -> list[dict]:
    """The rows of a table, or none if there is none. Raises BadInput for other columns."""
    if not path.exists():
        return []
    if path.is_dir():
        raise BadInput(f"{path} is no record of runs, but a folder.")
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != columns:
            raise BadInput(f"{path} is no record of runs: its columns are not those of one.")
        return list(rows)


def add_rows(path: Path, columns: list[str], rows: list[list]):
    """Append to a table, with its header if it is new."""
    if not rows:
        return
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns, *rows] if new else rows)


def curve_of(run: Run, result: Path, steps: int, cache: Path | None = None) -> Curve:
    """The scores of a run's folder, every so many steps; offline runs have evaluations alone."""
    return run_of(read_folder(result, cache), max(steps, 1), evaluation=run.agent == "cql_offline")


def shown_command(run: Run) -> str:
    """The command as a person would give it."""
    _, script, *words = run.command(Path())
    return shlex.join(["python", f"agents/{Path(script).name}", *words])
