"""Every figure of the study as one command.

  python -m experiments list                       figures, what each asks, runs, hours
  python -m experiments run fig2.1 --scale minatar run what it needs, here or with --cluster slurm
  python -m experiments figure fig2.1 --scale minatar

Flags of agents come last, after --: python -m experiments run fig2.1 --scale smoke -- --no-cuda
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from analysis.runs import BadInput
from experiments import draw, speeds
from experiments.figures import FIGURES
from experiments.local import Launcher, count_cores
from experiments.plan import check_plan, claim_folder, find_figure, make_plan, read_overrides
from experiments.record import Record
from experiments.slurm import Cluster, check_arrays, submit


@dataclass
class Common:
    """What all commands take."""

    scale: Literal["paper", "minatar", "smoke"] = "paper"  # the study's; MinAtar, for a laptop; minutes, for tests
    folder: Path | None = None  # of the runs, which figures of one scale share (default: studies/<scale>)
    record: Path | None = None  # CSV file with a line for each finished run; what it has is not run again

    def __post_init__(self):
        self.folder = self.folder or Path("studies") / self.scale


@dataclass
class List(Common):
    """List the figures."""

    trial: bool = False  # measure the steps per second of each agent first, a minute each


@dataclass
class Figures(Common):
    """Draw figures from what is there."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()  # fig2.1 ..., or all
    out: Path | None = None  # folder for the figures (default: <folder>/figures)

    def __post_init__(self):
        super().__post_init__()
        if not self.names:
            raise BadInput("name a figure, or all: python -m experiments list shows them.")
        if self.names == ("all",):
            self.names = tuple(name for name in FIGURES if self.scale != "minatar" or not FIGURES[name].atari_only)
        self.out = self.out or self.folder / "figures"


@dataclass
class Run(Figures):
    """Run what figures need, going on with what was stopped, and draw them."""

    jobs: int = field(default_factory=count_cores)  # runs at a time, on this machine
    threads: int = 0  # of each run (0: the cores, divided among the jobs)
    cluster: Literal["slurm"] | None = None  # submit instead, as a job array
    slurm: Annotated[Cluster, tyro.conf.arg(name="")] = field(default_factory=Cluster)


def run(args: Run, overrides: dict) -> int:
    """Run a plan here, or submit it; return the exit status."""
    check_plan(args.names, args.scale, overrides)
    plan = make_plan(args.names, args.scale, overrides)
    if args.jobs < 1 or args.threads < 0:
        raise BadInput("--jobs must be at least 1, --threads 0 or more.")
    claim_folder(args.folder, args.scale, overrides)
    check_arrays(args.folder)
    if args.cluster:
        arrays = submit(plan, args.folder, args.slurm)
        print(f"submitted as {' and '.join(arrays) or 'nothing: all is finished'}: squeue --me shows them")
        return 0
    status = Launcher(plan, args.folder, args.jobs, args.threads, Record(args.record)).run()
    return status if status > 1 else max(status, figure(args, overrides))


def figure(args: Figures, overrides: dict) -> int:
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
    try:
        overrides = read_overrides(words[end + 1 :])
        commands = {"list": List, "run": Run, "figure": Figures}
        args = tyro.extras.subcommand_cli_from_dict(
            commands, args=words[:end], prog="python -m experiments", description=__doc__
        )
        if isinstance(args, Run):
            raise SystemExit(run(args, overrides))
        if isinstance(args, Figures):
            raise SystemExit(figure(args, overrides))
        speeds.list_figures(args.scale, args.trial)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
