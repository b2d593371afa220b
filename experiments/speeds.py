"""How long a figure takes on this machine, from a minute's trial of each agent."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from analysis.runs import BadInput
from experiments.figures import FIGURES
from experiments.local import count_cores
from experiments.plan import ROOT, Run, check_figure, defaults_of, make_plan

KNOWN = Path("studies") / "speeds.json"  # {game kind: {agent and flags: {batch size or games: steps per second}}}
COSTLY = ("network", "replay_ratio", "updates_per_step", "width_scale", "batch_divisor")
ON_POLICY = ("pqn", "ppo")  # they have games side by side, and no batch size
GAMES = {"ALE": "ALE/Pong-v5", "MinAtar": "MinAtar/Breakout-v1"}


def list_figures(scale: str, trial: bool):
    """Print a table of the figures."""
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    asked = [name for name, figure in FIGURES.items() if scale != "minatar" or not figure.atari_only]
    for name in asked:
        check_figure(name, scale)
    plans = {name: make_plan([name], scale, {}) if name in asked else [] for name in FIGURES}
    if trial:
        for plan in plans.values():
            for item in plan:
                measure(item, known)
    print(f"{'figure':12} {'runs':>6} {'hours':>8}  asks")
    for name, figure in FIGURES.items():
        hours = [hours_of(item, known) for item in plans[name]]
        shown = "?" if None in hours else f"{sum(hours) / count_cores():,.1f}" if hours else "-"
        print(f"{name:12} {len(plans[name]) or '-':>6} {shown:>8}  {figure.asks}")
    print(f"hours: of all its runs, --scale {scale}, {count_cores()} at a time; figures that share runs share hours")
    if any(hours_of(item, known) is None for plan in plans.values() for item in plan):
        print(f"hours are known after a trial: python -m experiments list --scale {scale} --trial")


def costs_of(item: Run) -> dict[str, object]:
    """The agent and those of its flags that decide how long a step takes, but for batch size and games."""
    agent = "dqn" if item.agent == "cql_offline" else item.agent  # which acts besides
    flags = defaults_of(agent) | dict(item.flags)
    return {"agent": agent} | {name: flags[name] for name in COSTLY if name in flags}


def place_of(item: Run) -> tuple[str, str]:
    """Where its speed is kept."""
    costs = costs_of(item)
    agent = costs.pop("agent")
    return item.env_id.split("/")[0], " ".join([agent, *(f"{name}={value}" for name, value in costs.items())])


def measure(item: Run, known: dict):
    """Time an agent with batches, or games, of 8 and 32, unless it is known, on one thread.

    Raises BadInput if it does not run.
    """
    if not isinstance(item, Run):
        return
    games, name = place_of(item)
    if name in known.setdefault(games, {}):
        return
    costs = costs_of(item)
    agent, network = costs.pop("agent"), costs.pop("network", "dopamine")
    print(f"a minute's trial of {name} on {GAMES[games]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speeds.json"
        words = f"--games {GAMES[games]} --agents {agent} --network {network} --batch-sizes 8 32 --num-envs 8 32"
        words += " --rounds 5 --seconds 2 --threads 1 --no-sb3"
        if costs:
            words += f" --flags {' '.join(f'{flag} {value}' for flag, value in costs.items())}"
        command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), *words.split(), "--out", str(out)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise BadInput(f"{name} could not be timed.")
        results = json.loads(out.read_text())["results"]
    sizes = [row.get("num_envs") or row["batch_size"] for row in results]
    speeds = [sorted(row["speeds"]["ours"])[2] for row in results]
    known[games][name] = {str(size): speed for size, speed in zip(sizes, speeds, strict=True)}
    KNOWN.parent.mkdir(exist_ok=True)
    KNOWN.write_text(json.dumps(known, indent=2))


def hours_of(item, known: dict) -> float | None:
    """Hours on one core: the time of a step grows linearly with the batch; with more than 32 games it stays the same.

    None if the agent has had no trial.
    """
    if not isinstance(item, Run):
        return 0.0
    games, name = place_of(item)
    if name not in known.get(games, {}):
        return None
    small, usual = (1 / known[games][name][size] for size in ("8", "32"))  # seconds a step
    flags = dict(item.flags)
    batch_size = min(flags.get("num_envs", 8), 32) if item.agent in ON_POLICY else flags.get("batch_size", 32)
    return item.steps * (small + (usual - small) * (batch_size - 8) / 24) / 3600
