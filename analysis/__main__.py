"""From run folders, or a table of scores, to tables and figures with bootstrap intervals.

  python -m analysis runs/ --out results/
  python -m analysis --scores scores.csv --by agent --out results/
  python -m analysis compare "qrdqn, batch size 8" "qrdqn, batch size 32" --runs runs/
  python -m analysis contribution --gammas 0.97 0.99 0.997 --out contribution.png
  python -m analysis coverage runs/ --by agent,num_envs --out coverage.png

The first two write CSV and Markdown tables, PNG and SVG figures, and report.html, one page with all but the longest.
The third prints two settings side by side. The fourth draws what a reward counts for when it is t steps away, the fifth
what part of a game each setting saw. A table of scores has the columns agent, game, seed, frames and score; all others
are settings, by which --by can group and --only choose.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from analysis import coverage
from analysis.compare import compare
from analysis.figures import contribution
from analysis.report import check_out, write_report
from analysis.results import compute, find_label
from analysis.runs import BadInput, Folder, find_folders, read_folders
from analysis.scores import (
    Run,
    Study,
    check_grouping,
    describe,
    get,
    iteration_steps,
    make_study,
    read_baselines,
    read_scores,
    run_of,
    setting_of,
    short_name,
    value_of,
)


@dataclass
class Common:
    """What both commands take."""

    scores: tuple[Path, ...] = ()  # CSV files (or .csv.gz) of scores, besides run folders or instead of them
    by: str = ""  # columns or flags to group by, with commas (default: agent, batch_size, and a table's settings)
    only: tuple[str, ...] = ()  # keep runs with these values: batch_size=8,32 agent=qrdqn
    games: tuple[str, ...] = ()  # keep these games: Pong Breakout, or MinAtar/Breakout (default: all)
    normalize: str = "auto"  # human, none, baseline:<setting>; auto: human, and none where no human score is known
    evaluation: bool = False  # score runs by their evaluations instead of their training games
    iteration: int = 0  # agent steps of an iteration (0: 250,000, or a twentieth of the shortest run that is compared)
    finished_only: bool = False  # leave out runs that have not reached their --total-timesteps
    resamples: int = 50_000  # of the bootstrap
    seed: int = 0  # of the bootstrap's generator
    cache: Path | None = None  # folder for what was read of runs (default: cache/ in --out; compare has none)


@dataclass
class Report(Common):
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders that hold runs, at any depth
    out: Path = Path("results")  # folder for tables and figures; replaced if this program wrote it
    reference: str | None = None  # setting drawn in black, that others are compared with (default: batch size 32)


@dataclass
class Contribution:
    gammas: tuple[float, ...] = (0.97, 0.99, 0.997)  # discounts per agent step
    steps: int = 500  # agent steps ahead
    out: Path = Path("contribution.png")  # file to write


@dataclass
class Coverage:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders that hold runs with --save-features, at any depth
    by: tuple[str, ...] = ("agent", "num_envs", "num_steps")  # flags that make a setting
    of: Literal["observations", "features"] = "observations"  # features compare within one network alone
    rows: int = 2_000  # points of each setting, or as many as the setting with the fewest has
    seed: int = 0  # of the drawing and the projection
    out: Path = Path("coverage.png")  # file to write


@dataclass
class Compare(Common):
    pair: Annotated[tyro.conf.Positional[tuple[str, str]], tyro.conf.arg(metavar="A B")] = field(default=("", ""))
    """settings, as the report's tables name them: "qrdqn, batch size 8", or an agent that has one setting only"""
    runs: tuple[Path, ...] = ()  # folders that hold runs, at any depth


def read_runs(args: Common, cache: Path | None) -> list[tuple[Run, Folder | None]]:
    """Read what the flags name and choose; folders are described, as yet without curves.

    Raises BadInput if nothing is left.
    """
    for choice in args.only:
        if "=" not in choice:
            raise BadInput(f"--only {choice}: it takes batch_size=8 or the like; folders with runs come before it.")
    if not args.runs and not args.scores:
        raise BadInput("name folders with runs, or a table with --scores.")
    if not 1 <= args.resamples <= 10_000_000 or args.iteration < 0 or args.seed < 0:
        raise BadInput("--resamples must be from 1 to 10,000,000, --iteration and --seed not negative.")
    folders = read_folders(find_folders(args.runs), cache) if args.runs else []
    folders = [folder for folder in folders if folder.finished or not args.finished_only]
    tables = [run for path in args.scores for run in read_scores(path)]
    described = [*((describe(folder), folder) for folder in folders), *((run, None) for run in tables)]
    places = {id(run) for run in chosen([run for run, _ in described], args)}
    kept = [(run, folder) for run, folder in described if id(run) in places]
    if not kept:
        raise BadInput("no run is left: choose less narrowly.")
    return kept


def chosen(runs: list[Run], args: Common) -> list[Run]:
    """Return the runs that --only and --games choose. Raises BadInput for names and values that no run has."""
    kept = runs
    for choice in args.only:
        name, _, values = choice.partition("=")
        name = column(name, runs)
        known = {get(run, name) for run in runs}
        spelt = {str(value): value for value in known}  # None among them
        wanted = [spelt.get(value, value_of(value)) for value in values.split(",")]
        if known <= {None}:
            raise BadInput(f"--only {choice}: no run has {name!r}.")
        if unknown := [value for value in wanted if value not in known]:
            there = ", ".join(sorted(map(str, known)))
            raise BadInput(f"--only {choice}: no run has {name} {unknown[0]}; there are {there}.")
        kept = [run for run in kept if get(run, name) in wanted]
    if args.games:
        wanted, known = {short_name(game) for game in args.games}, {run.game for run in runs}
        if unknown := sorted(wanted - known):
            raise BadInput(f"--games {' '.join(unknown)}: there are runs of {', '.join(sorted(known))}.")
        kept = [run for run in kept if run.game in wanted]
    return kept


def column(word: str, runs: list[Run]) -> str:
    """The column or flag that is meant: n-step and --n-step are n_step, unless a table has a column of that name."""
    word = word.strip()
    if any(get(run, word) is not None for run in runs):
        return word
    return word.removeprefix("--").replace("-", "_")


def default_grouping(runs: list[Run], from_tables: bool) -> list[str]:
    """Return agent, batch_size, and a roll-out's shape if it varies; of tables every setting that varies."""
    by = ["agent"]
    if any("batch_size" in run.settings for run in runs):
        by.append("batch_size")
    for name in ("num_envs", "num_steps"):
        if len({run.settings[name] for run in runs if name in run.settings}) > 1:
            by.append(name)
    if from_tables:
        names = dict.fromkeys(name for run in runs for name in run.settings if name not in by)
        by += [name for name in names if len({get(run, name) for run in runs}) > 1]
    return by


def study_of(args: Common, cache: Path | None, pair: tuple[str, ...] = ()) -> Study:
    """Read, group and normalise; with a pair, nothing but these settings, and the baseline if there is one."""
    found = read_runs(args, cache)
    runs = [run for run, _ in found]
    by = [column(name, runs) for name in args.by.split(",") if name.strip()]
    by = by or default_grouping(runs, from_tables=not args.runs)
    normalize = args.normalize
    if normalize == "auto":
        baselines = read_baselines()
        normalize = "human" if any(run.game in baselines for run in runs) else "none"
    if pair:
        check_grouping(runs, by)
        labels = sorted({setting_of(run, by) for run in runs})
        _, is_baseline, baseline = normalize.partition("baseline:")
        named = [find_label(labels, name) for name in (*pair, *([baseline] if is_baseline else []))]
        found = [(run, folder) for run, folder in found if setting_of(run, by) in named]
    logged = [(run, folder) for run, folder in found if folder]
    steps = args.iteration or (iteration_steps(logged, by) if logged else 0)
    curves = [run_of(folder, steps, args.evaluation) if folder else run for run, folder in found]
    return make_study(curves, by, normalize)


def report(args: Report) -> None:
    """Write tables, figures and report.html."""
    check_out(args.out, [*args.runs, *args.scores])
    cache = args.cache or args.out / "cache"
    study = study_of(args, cache)
    results = compute(study, args.reference, args.resamples, np.random.default_rng(args.seed))
    names = write_report(results, args.out, shlex.join(["python", "-m", "analysis", *sys.argv[1:]]))
    for note in study.notes:
        print(note)
    print(f"{len(names)} files in {args.out}: open {args.out / 'report.html'}")


def draw_contribution(args: Contribution) -> None:
    """Draw gamma^t."""
    if not all(0 <= gamma <= 1 for gamma in args.gammas) or not args.gammas:
        raise BadInput("--gammas must be from 0 to 1.")
    if not 1 <= args.steps <= 1_000_000:
        raise BadInput("--steps must be from 1 to 1,000,000.")
    check_picture(args.out)
    contribution(args.gammas, args.steps).savefig(args.out)
    print(args.out)


def draw_coverage(args: Coverage) -> None:
    """Draw what each setting saw, and print its share of the cells."""
    if not 2 <= args.rows <= 1_000_000 or not 0 <= args.seed < 2**32:
        raise BadInput("--rows must be from 2 to 1,000,000, and --seed from 0 to 4,294,967,295.")
    check_picture(args.out)
    by = [column(name, []) for word in args.by for name in word.split(",")]
    projected = {}
    print(f"| game | setting | points | share of {coverage.GRID}x{coverage.GRID} cells |")
    print("|-|-|-|-|")
    for game, samples in coverage.read_settings(args.runs, by, args.of).items():
        projected[game] = coverage.project(samples, args.rows, args.seed)
        for label, share in coverage.shares(projected[game]).items():
            print(f"| {game} | {label} | {len(projected[game][label]):,} | {share:.1%} |")
    coverage.draw(projected, args.of).savefig(args.out)
    print(args.out)


def check_picture(path: Path) -> None:
    """Raise BadInput unless a picture can have this name."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--out is {path}: its name must end in .png, .svg or .pdf.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out is {path}: {path.parent} cannot be made: {error.strerror}.") from None


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["compare"]:
            args = tyro.cli(Compare, args=arguments[1:], prog="python -m analysis compare", description=__doc__)
            study = study_of(args, args.cache, args.pair)
            print(compare(study, *args.pair, args.resamples, np.random.default_rng(args.seed)))
        elif arguments[:1] == ["contribution"]:
            draw_contribution(tyro.cli(Contribution, args=arguments[1:], prog="python -m analysis contribution"))
        elif arguments[:1] == ["coverage"]:
            args = tyro.cli(Coverage, args=arguments[1:], prog="python -m analysis coverage", description=__doc__)
            draw_coverage(args)
        else:
            report(tyro.cli(Report, args=arguments, prog="python -m analysis", description=__doc__))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
