"""A record: a line for each run that is finished, kept when the run folders are not."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np

from analysis.runs import BadInput, read_folder
from analysis.scores import Run as Curve
from analysis.scores import run_of, short_name
from experiments.plan import Export, Run

POINTS = 20  # scores of a run: mean returns of the training games that ended in each twentieth
SCORES = [f"score_{number}" for number in range(1, POINTS + 1)]
COLUMNS = ["agent", "game", "seed", "setting", "steps", *SCORES, "commit", "command"]


class Record:
    """A CSV file, or nothing if there is no path. Raises BadInput if the file is no record."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[str, dict] = {}  # by the run's command
        if path and path.exists():
            with open(path, newline="") as file:
                rows = csv.DictReader(file)
                if rows.fieldnames != COLUMNS:
                    raise BadInput(f"{path} is no record of runs: its columns are not those of one.")
                self.rows = {row["command"]: row for row in rows}

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
        values = [run.agent, run.env_id, run.seed, run.exp_name, run.steps, *points, commit, shown_command(run)]
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            writer.writerow(values)
        self.rows[shown_command(run)] = dict(zip(COLUMNS, map(str, values), strict=True))

    def curve(self, run: Run) -> Curve:
        """A line as analysis has runs."""
        row = self.rows[shown_command(run)]
        numbers = [number for number in range(1, POINTS + 1) if row[f"score_{number}"]]
        frames_per_step = 4 if run.env_id.startswith("ALE/") else 1
        frames = np.array(numbers) * (run.steps // POINTS) * frames_per_step
        scores = np.array([float(row[f"score_{number}"]) for number in numbers])
        return Curve(run.agent, short_name(run.env_id), run.seed, frames, scores, run.name)


def curve_of(run: Run, result: Path, steps: int, cache: Path | None = None) -> Curve:
    """The scores of a run's folder, every so many steps; offline runs have evaluations alone."""
    return run_of(read_folder(result, cache), max(steps, 1), evaluation=run.agent == "cql_offline")


def shown_command(run: Run) -> str:
    """The command as a person would give it."""
    _, script, *words = run.command(Path())
    return shlex.join(["python", f"agents/{Path(script).name}", *words])
