"""From run folders, or a table of scores, to tables and figures with bootstrap intervals.

  python -m analysis runs/ --out results/
  python -m analysis --scores scores.csv --by agent --out results/
  python -m analysis compare "qrdqn, batch size 8" "qrdqn, batch size 32" --runs runs/

The first two write CSV and Markdown tables, PNG and SVG figures, and report.html, which holds them all. The third
prints two settings side by side. A table of scores has the columns agent, game, seed, frames and score; all others are
settings, by which --by can group and --only can choose.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from analysis.compare import compare
from analysis.report import check_out, write_report
from analysis.results import compute
from analysis.runs import BadInput, find_folders, read_folders
from analysis.scores import Run, get, iteration_steps, make_study, read_scores, run_of, short_name


@dataclass
class Common:
    """What both commands take."""

    scores: tuple[Path, ...] = ()  # CSV files (or .csv.gz) of scores, besides run folders or instead of them
    by: str = ""  # columns or flags to group by, with commas (default: agent,batch_size, or agent)
    only: tuple[str, ...] = ()  # keep runs with these values: batch_size=8,32 agent=qrdqn
    games: tuple[str, ...] = ()  # keep these games: Pong Breakout, or MinAtar/Breakout (default: all)
    normalize: str = "auto"  # human, none, baseline:<setting>; auto: human, and none where no human score is known
    evaluation: bool = False  # score runs by their evaluations instead of their training games
    iteration: int = 0  # agent steps of an iteration (0: 250,000, or a twentieth of the shortest run)
    finished_only: bool = False  # leave out runs that have not reached their --total-timesteps
    resamples: int = 50_000  # of the bootstrap
    seed: int = 0  # of the bootstrap's generator
    cache: Path | None = None  # folder for what was read of runs (default: cache/ in the folder of --out)


@dataclass
class Report(Common):
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders that hold runs, at any depth
    out: Path = Path("results")  # folder for tables and figures; replaced if this program wrote it
    reference: str | None = None  # setting drawn in black, that others are compared with (default: batch size 32)


@dataclass
class Compare(Common):
    pair: Annotated[tyro.conf.Positional[tuple[str, str]], tyro.conf.arg(metavar="A B")] = field(default=("", ""))
    """settings, as the report's tables name them: "qrdqn, batch size 8", or an agent that has one setting only"""
    runs: tuple[Path, ...] = ()  # folders that hold runs, at any depth


def read_runs(args: Common, cache: Path | None) -> list[Run]:
    """Read what the flags name and choose. Raises BadInput if nothing is left."""
    if not args.runs and not args.scores:
        raise BadInput("name folders with runs, or a table with --scores.")
    if not 1 <= args.resamples <= 10_000_000 or args.iteration < 0 or args.seed < 0:
        raise BadInput("--resamples must be from 1 to 10,000,000, --iteration and --seed not negative.")
    runs = []
    if args.runs:
        folders = read_folders(find_folders(args.runs), cache)
        if args.finished_only:
            folders = [folder for folder in folders if folder.finished]
        if folders:
            steps = args.iteration or iteration_steps(folders)
            runs += [run_of(folder, steps, args.evaluation) for folder in folders]
    for path in args.scores:
        runs += read_scores(path)
    for choice in args.only:
        name, _, values = choice.partition("=")
        if not any(get(run, name) is not None for run in runs):
            raise BadInput(f"--only {choice}: no run has {name!r}.")
        runs = [run for run in runs if str(get(run, name)) in values.split(",")]
    if args.games:
        wanted = {short_name(game) for game in args.games}
        if unknown := sorted(wanted - {run.game for run in runs}):
            known = ", ".join(sorted({run.game for run in runs}))
            raise BadInput(f"--games {' '.join(unknown)}: there are runs of {known}.")
        runs = [run for run in runs if run.game in wanted]
    if not runs:
        raise BadInput("no run is left: choose less narrowly.")
    return runs


def study_of(args: Common, cache: Path | None):
    """Read, group and normalise."""
    runs = read_runs(args, cache)
    by = [name.strip() for name in args.by.split(",") if name.strip()]
    by = by or ["agent", *["batch_size"] * any("batch_size" in run.settings for run in runs)]
    normalize = args.normalize
    if normalize == "auto":
        normalize = "none" if all(run.game.startswith("MinAtar/") for run in runs) else "human"
    return make_study(runs, by, normalize)


def report(args: Report) -> None:
    """Write tables, figures and report.html."""
    check_out(args.out)
    cache = args.cache or args.out / "cache"
    study = study_of(args, cache)
    results = compute(study, args.reference, args.resamples, np.random.default_rng(args.seed))
    names = write_report(results, args.out, shlex.join(["python", "-m", "analysis", *sys.argv[1:]]))
    for note in study.notes:
        print(note)
    print(f"{len(names)} files in {args.out}: open {args.out / 'report.html'}")


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["compare"]:
            args = tyro.cli(Compare, args=arguments[1:], prog="python -m analysis compare", description=__doc__)
            study = study_of(args, args.cache)
            print(compare(study, *args.pair, args.resamples, np.random.default_rng(args.seed)))
        else:
            report(tyro.cli(Report, args=arguments, prog="python -m analysis", description=__doc__))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
