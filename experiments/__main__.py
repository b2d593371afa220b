"""Every figure of the study as one command.

  python -m experiments list                       figures, what each asks, runs, hours
  python -m experiments run fig2.1 --scale minatar run what it needs, here or with --cluster slurm
  python -m experiments figure fig2.1 --scale minatar

Flags of agents come last, after --: python -m experiments run fig2.1 --scale smoke -- --no-cuda
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import psutil
import tyro

from analysis.runs import BadInput
from experiments import draw, speeds
from experiments.local import Launcher, count_cores, take_lock
from experiments.plan import (
    all_names,
    check_plan,
    claim_folder,
    find_figure,
    make_plan,
    read_overrides,
    without_needless,
)
from experiments.record import Record
from experiments.slurm import Cluster, check_arrays, submit

Scale = Literal["paper", "minatar", "smoke"]


@dataclass
class ListArgs:
    """List the figures: what each asks, its runs and hours."""

    scale: Scale = "paper"  # the study's; MinAtar, for a laptop; minutes, for tests
    trial: bool = False  # measure the steps per second of each agent first, a minute each


@dataclass
class DrawArgs:
    """Draw figures from what is there."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()  # fig2.1 ..., or all
    scale: Scale = "paper"  # the study's; MinAtar, for a laptop; minutes, for tests
    folder: Path | None = None  # of the runs, which figures of one scale share (default: studies/<scale>)
    record: Path | None = None  # CSV file with a line for each finished run; what it has is not run again
    out: Path | None = None  # folder for the figures (default: <folder>/figures)

    def __post_init__(self):
        if not self.names:
            raise BadInput("name a figure, or all: python -m experiments list shows them.")
        if self.names == ("all",):
            self.names = all_names(self.scale)
        self.folder = self.folder or Path("studies") / self.scale
        self.out = self.out or self.folder / "figures"
        if self.out.exists() and not self.out.is_dir():
            raise BadInput(f"--out is a folder for the figures: {self.out} is a file.")


@dataclass
class RunArgs(DrawArgs):
    """Run what figures need, going on with what was stopped, and draw them."""

    jobs: int = 0  # runs at a time, on this machine (0: as many as it has cores, and on Atari memory for)
    threads: int = 0  # of each run (0: the cores, divided among the jobs)
    keep_checkpoints: bool = False  # of finished runs, with their replays
    cluster: Literal["slurm"] | None = None  # submit instead, as a job array
    slurm: Annotated[Cluster, tyro.conf.arg(name="")] = field(default_factory=Cluster)


def run(args: RunArgs, overrides: dict) -> int:
    """Run a plan here and draw its figures, or submit it; return the exit status."""
    if args.jobs < 0 or args.threads < 0:
        raise BadInput("--jobs and --threads must not be negative.")
    if args.cluster:
        args.slurm.check()
    record = Record(args.record)
    plan = without_needless(make_plan(args.names, args.scale, overrides), args.folder, record)
    claim_folder(args.folder, args.scale, overrides)
    check_arrays(args.folder)
    lock = take_lock(args.folder)
    if args.cluster:
        arrays = submit(plan, args.folder, args.slurm, record, args.keep_checkpoints)
        print(f"submitted as {' and '.join(arrays) or 'nothing: all is finished'}: squeue --me shows them")
        return 0
    jobs = args.jobs or default_jobs(args.scale)
    threads = args.threads or max(1, count_cores() // jobs)
    status = Launcher(plan, args.folder, jobs, threads, record, lock, args.keep_checkpoints).run()
    return status if status > 1 else max(status, draw_all(args, overrides))


def default_jobs(scale: str) -> int:
    """One for each core, if there is memory for their replays: 7.1 GB each on Atari."""
    free = psutil.virtual_memory().available
    return max(1, min(count_cores(), int(free / 8e9))) if scale == "paper" else count_cores()


def draw_all(args: DrawArgs, overrides: dict) -> int:
    """Draw figures, say what is missing and what they show; return 1 if one cannot be drawn yet."""
    status = 0
    for name in args.names:
        try:
            draw.draw(name, find_figure(name), args.scale, overrides, args.folder, Record(args.record), args.out)
        except BadInput as error:
            print(f"{name} cannot be drawn: {error}", file=sys.stderr)
            status = 1
    return status


def main():
    """Run the command line."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    commands = {"list": ListArgs, "run": RunArgs, "figure": DrawArgs}
    try:
        overrides = read_overrides(words[end + 1 :])
        args = tyro.extras.subcommand_cli_from_dict(
            commands, args=words[:end], prog="python -m experiments", description=__doc__
        )
        if isinstance(args, ListArgs):
            speeds.list_figures(args.scale, args.trial)
            return
        check_plan(args.names, args.scale, overrides)
        work = run if isinstance(args, RunArgs) else draw_all
        raise SystemExit(work(args, overrides))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
