"""From figures to the runs they need: agent, game, seed and flags of each, at the scale that is asked for."""

import ast
import csv
import difflib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from analysis.runs import BadInput
from analysis.scores import DATA, short_name
from experiments.figures import FIGURES, MINATAR, SMOKE, SMOKE_STEPS, SMOKE_STEPS_ON_ATARI, Figure

ROOT = Path(__file__).resolve().parent.parent
DRAWINGS = ("curves", "games", "gains", "time", "diagnostics", "measures")  # functions of analysis/panels.py
TYPES = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,), "None": (type(None),)}


@dataclass(frozen=True)
class Run:
    """A run of an agent, below <folder>/runs."""

    agent: str
    env_id: str
    seed: int
    flags: tuple[tuple[str, object], ...]  # sorted; all but --env-id, --seed and --exp-name
    exp_name: str  # agent and what is not usual in it
    needs: tuple = ()  # what must be finished before
    is_recording: bool = False  # its replay becomes a dataset

    @property
    def name(self) -> str:
        return f"{self.exp_name} {self.env_id} seed {self.seed}"

    @property
    def steps(self) -> int:
        """Agent steps; of agents without a replay those of whole roll-outs."""
        flags = defaults_of(self.agent) | dict(self.flags)
        rollout = flags.get("num_envs", 1) * flags.get("num_steps", 1)
        return flags["total_timesteps"] // rollout * rollout

    @property
    def kind(self) -> tuple:
        """Runs of one kind are about as fast."""
        flags = dict(self.flags)
        batch_size = flags.get("num_envs", 0) or flags.get("batch_size", 32)
        return self.agent, batch_size, flags.get("network", "dopamine"), self.env_id

    def command(self, folder: Path) -> list[str]:
        words = [sys.executable, str(ROOT / "agents" / f"{self.agent}.py")]
        words += ["--env-id", self.env_id, "--seed", str(self.seed), "--exp-name", self.exp_name]
        for name, value in self.flags:
            words += as_words(name, value)
        return [*words, "--resume", "auto"]

    def result(self, folder: Path) -> Path | None:
        """Its folder, if it is finished, and was run with these flags and what are now the defaults of others."""
        name = f"{self.env_id.replace('/', '-')}__{self.exp_name}__{self.seed}__*"
        usual = defaults_of(self.agent)
        wanted = usual | dict(self.flags)
        wanted = {flag: value for flag, value in wanted.items() if value is not None}  # None: the agent chooses
        for mark in sorted((folder / "runs").glob(f"{name}/finished"), reverse=True):
            args = json.loads((mark.parent / "args.json").read_text())["args"]
            recorded = usual | args  # a flag that is newer than the run had its default
            if all(recorded[flag] == wanted[flag] for flag in wanted.keys() - {"env_id", "seed", "resume", "cuda"}):
                return mark.parent
        return None


@dataclass(frozen=True)
class Export:
    """A run's replay as a dataset, for cql_offline.py."""

    run: Run
    steps: int = 0

    @property
    def name(self) -> str:
        return f"dataset of {self.run.env_id}"

    @property
    def kind(self) -> tuple:
        return ("export",)

    @property
    def needs(self) -> tuple:
        return (self.run,)

    def place(self) -> str:
        return f"datasets/{self.run.env_id.replace('/', '-')}"

    def command(self, folder: Path) -> list[str]:
        rows = self.run.steps * 2 // 9  # five files, as cql_offline.py draws five; games are padded by up to a tenth
        script = str(ROOT / "export_dataset.py")
        return [sys.executable, script, str(self.run.result(folder).resolve()), self.place(), "--rows", str(rows)]

    def result(self, folder: Path) -> Path | None:
        mark = folder / self.place() / "export.json"
        if not mark.exists() or json.loads(mark.read_text())["steps"] < self.run.steps:
            return None
        return mark.parent


def as_words(name: str, value) -> list[str]:
    """A flag as it stands on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def flags_of(agent: str) -> dict[str, ast.AnnAssign]:
    """The flags of an agent but --exp-name, as its file declares them.

    Raises BadInput if there is no such agent.
    """
    path = ROOT / "agents" / f"{agent}.py"
    if not path.exists():
        raise BadInput(f"there is no agents/{agent}.py.")
    (args,) = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "Args"]
    declared = {node.target.id: node for node in args.body if isinstance(node, ast.AnnAssign)}
    return {flag: node for flag, node in declared.items() if flag != "exp_name"}


@cache
def defaults_of(agent: str) -> dict:
    """The flags of an agent but --exp-name, and their defaults, read from its file without running it."""
    found = {}
    for flag, node in flags_of(agent).items():
        try:
            found[flag] = ast.literal_eval(node.value)
        except ValueError:
            raise BadInput(f"{agent}.py, line {node.lineno}: a flag's default must be a plain value.") from None
    return found


def find_figure(name: str) -> Figure:
    """Raises BadInput, with the nearest names, if there is none of this name."""
    if name in FIGURES:
        return FIGURES[name]
    near = difflib.get_close_matches(name, FIGURES, 3, 0.5) or ["python -m experiments list"]
    raise BadInput(f"there is no figure {name!r}: try {', '.join(near)}.")


def all_names(scale: str) -> tuple[str, ...]:
    """The figures that can be asked together: --dataset-dir is a flag of one agent alone."""
    if scale == "paper":
        return tuple(name for name, figure in FIGURES.items() if not needs_dataset(figure))
    if scale == "minatar":
        return tuple(name for name, figure in FIGURES.items() if not figure.atari_only)
    return tuple(FIGURES)


def needs_dataset(figure: Figure) -> bool:
    """Whether its runs on Atari take --dataset-dir; on MinAtar recordings are made."""
    return "cql_offline" in figure.agents


def games_of(figure: Figure, scale: str) -> list[str]:
    """The figure's games at this scale, as --env-id has them. Raises BadInput if there is no such list of games."""
    if scale == "paper":
        names = figure.games
        if isinstance(names, str):
            with open(DATA / "game_lists.csv") as file:
                rows = list(csv.DictReader(file))
            if f"in_{names}" not in rows[0]:
                lists = ", ".join(column[3:] for column in rows[0] if column.startswith("in_"))
                raise BadInput(f'there is no list of games {names!r}: there are {lists}; one game is ("{names}",).')
            names = [row["game"] for row in rows if row[f"in_{names}"] == "1"]
        return [f"ALE/{name}-v5" for name in names]
    if scale == "smoke":
        return ["ALE/Pong-v5"] if figure.atari_only else ["MinAtar/Breakout-v1"]
    return [f"MinAtar/{name}-v1" for name in figure.minatar_games]


def seeds_of(figure: Figure, scale: str) -> range:
    enough = figure.minatar_seeds or max(figure.seeds, 5)  # five: what an interval takes
    count = {"paper": figure.seeds, "minatar": enough, "smoke": 2}[scale]
    return range(1, count + 1)


def variants_of(figure: Figure, scale: str) -> dict[str, dict]:
    return figure.variants if scale == "paper" else figure.variants | figure.minatar_variants


def values_of(figure: Figure, scale: str) -> dict[str, tuple]:
    """{flag: values} at this scale, with "agent" and "variant" among the flags."""
    varied = figure.varied if scale == "paper" else figure.varied | figure.minatar_varied
    if scale == "smoke" and len(varied.get("batch_size", ())) == 4:
        varied = varied | {"batch_size": (8, 32)}
    variants = {"variant": tuple(figure.variants)} if figure.variants else {}
    return {"agent": figure.agents, **variants, **varied}


def base_flags(figure: Figure, agent: str, scale: str) -> dict:
    """The flags that an agent has at this scale, whatever varies."""
    if scale == "paper":
        return {"total_timesteps": figure.steps}
    if scale == "minatar":
        return MINATAR[agent] | {"total_timesteps": figure.minatar_steps}
    longer = figure.minatar_steps // 100_000  # so that fig2.9 is no fig2.8
    steps = SMOKE_STEPS_ON_ATARI if figure.atari_only else SMOKE_STEPS + 20 * longer
    steps = figure.smoke_steps or steps
    return MINATAR[agent] | SMOKE | {"total_timesteps": steps, "iteration_steps": SMOKE_STEPS // 2}


def make_run(figure: Figure, setting: dict, env_id: str, seed: int, scale: str, overrides: dict) -> Run:
    """A run is named after what is not usual in it, so that it is the same one in every figure."""
    variant = dict(variants_of(figure, scale).get(setting.get("variant"), {}))
    agent = variant.pop("agent", setting["agent"])
    known = defaults_of(agent)
    usual = {name: value for name, value in base_flags(figure, agent, scale).items() if name in known}
    chosen = {name: value for name, value in setting.items() if name not in ("agent", "variant")}
    flags = known | usual | figure.flags | variant | chosen | overrides

    told = {name for name in flags if flags[name] != (known | usual)[name]}
    told |= {"batch_size", "total_timesteps"} & flags.keys()
    exp_name = ",".join([agent, *(f"{name}={flags[name]}" for name in sorted(told - {"dataset_dir"}))])
    given = {name: value for name, value in flags.items() if value != known[name] or name in told}

    needs = ()
    if agent == "cql_offline" and scale != "paper" and "dataset_dir" not in overrides:
        export = Export(make_recording(env_id, flags["total_timesteps"], scale))
        needs = (export,)
        given["dataset_dir"] = export.place()
    if "dataset_dir" in given:
        given["dataset_dir"] = given["dataset_dir"].replace("{game}", short_name(env_id))
    return Run(agent, env_id, seed, tuple(sorted(given.items())), exp_name, needs)


def make_recording(env_id: str, steps: int, scale: str) -> Run:
    """The DQN whose games the offline agents learn from: twice as many steps as theirs, all in its replay."""
    small = SMOKE if scale == "smoke" else {}
    flags = MINATAR["dqn"] | {name: value for name, value in small.items() if name in defaults_of("dqn")}
    flags |= {"total_timesteps": 2 * steps, "buffer_size": 2 * steps}
    return Run("dqn", env_id, 1, tuple(sorted(flags.items())), "dqn,recorded", is_recording=True)


def runs_of(figure: Figure, scale: str, overrides: dict) -> Iterator[tuple[dict, Run]]:
    """Every run of a figure with its setting, {flag: value}; the first seed of everything before the second."""
    values = values_of(figure, scale)
    settings = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    for seed, env_id, setting in product(seeds_of(figure, scale), games_of(figure, scale), settings):
        yield setting, make_run(figure, setting, env_id, seed, scale, overrides)


def make_plan(names: Iterable[str], scale: str, overrides: dict) -> list[Run | Export]:
    """All that the figures need, once each; the first seed of everything before the second."""
    order = {}
    for name in names:
        for _, run in runs_of(find_figure(name), scale, overrides):
            for export in run.needs:
                order |= {export.run: 0, export: 0}
            order[run] = run.seed
    return sorted(order, key=order.get)


def without_needless(plan: list[Run | Export], folder: Path, record) -> list[Run | Export]:
    """The plan but for recordings and datasets that no run waits for."""
    kept, needed = [], set()
    for item in reversed(plan):  # what is needed stands before what needs it
        is_asked = isinstance(item, Run) and not item.is_recording
        if is_asked or item in needed:
            kept.append(item)
            if not item.result(folder) and item not in record:
                needed.update(item.needs)
    return kept[::-1]


def agents_of(figure: Figure, scale: str) -> dict[str, set[str]]:
    """{agent: the flags that the figure gives it}; a variant may name another agent."""
    found = {}
    varied = values_of(figure, scale).keys() - {"agent", "variant"}
    for agent, variant in product(figure.agents, variants_of(figure, scale).values() or [{}]):
        flags = found.setdefault(variant.get("agent", agent), set())
        flags.update(varied, figure.flags, variant.keys() - {"agent"})
    return found


def check_figure(name: str, scale: str):
    """Raise BadInput if an entry of FIGURES is wrong, which would show in its drawing alone, after all runs."""
    figure = find_figure(name)
    values = values_of(figure, scale)
    drawn = {figure.line, *figure.panels}
    wrong = f"{name} of experiments/figures.py"
    if figure.draw not in DRAWINGS:
        raise BadInput(f"{wrong} is drawn as {figure.draw}: there are {', '.join(DRAWINGS)}.")
    games_of(figure, "paper")
    if not figure.panels:
        raise BadInput(f'{wrong} has no panels: give it ("agent",).')
    if unknown := sorted(drawn - values.keys()):
        raise BadInput(f"{wrong} has {unknown[0]} as its line or panels, but no values of it.")
    if hidden := [flag for flag, found in values.items() if len(found) > 1 and flag not in drawn]:
        raise BadInput(f"{wrong} varies {hidden[0]}, which is neither its line nor in its panels.")
    if figure.draw in ("gains", "diagnostics") and any(len(values[flag]) > 1 for flag in figure.panels):
        raise BadInput(f"{wrong} has several panels: {figure.draw} draws one.")
    for agent, flags in agents_of(figure, scale).items():
        for flag in flags:
            check_flag(agent, flag, f"{wrong}: ")
        if agent not in MINATAR and scale != "paper":
            raise BadInput(f"{wrong}: give {agent} a line in MINATAR there.")


def check_flag(agent: str, flag: str, where: str = ""):
    """Raise BadInput, with the nearest one, if an agent has no such flag."""
    if flag not in defaults_of(agent):
        near = difflib.get_close_matches(flag, defaults_of(agent), 1)
        near = f": --{near[0].replace('_', '-')}?" if near else "."
        raise BadInput(f"{where}{agent} has no flag --{flag.replace('_', '-')}{near}")


def check_value(agent: str, flag: str, value):
    """Raise BadInput if a flag does not take this value: every run would fail. Types that are not in TYPES pass."""
    declared = flags_of(agent)[flag].annotation
    kind = ast.unparse(declared)
    if kind.startswith("Literal"):
        choices = getattr(declared.slice, "elts", [declared.slice])  # or the only one
        allowed = [ast.literal_eval(choice) for choice in choices]
        wrong = value not in allowed
        kind = ", ".join(map(str, allowed))
    else:
        parts = kind.split(" | ")
        wrong = set(parts) <= TYPES.keys() and not any(type(value) in TYPES[part] for part in parts)
    if wrong:
        raise BadInput(f"--{flag.replace('_', '-')} of {agent} takes {kind}, not {value!r}.")


def check_plan(names: Iterable[str], scale: str, overrides: dict):
    """Raise BadInput if figures cannot be asked at this scale, or with these flags."""
    for name in names:
        figure = find_figure(name)
        if figure.atari_only and scale == "minatar":
            raise BadInput(f"{name} asks about networks for Atari's images, which MinAtar has not: --scale paper.")
        if needs_dataset(figure) and scale == "paper" and "dataset_dir" not in overrides:
            raise BadInput(f"{name} needs the DQN Replay Dataset: -- --dataset-dir '/data/{{game}}/1/replay_logs'.")
        check_figure(name, scale)
        varied = {"env_id", "seed", "exp_name", "resume", *figure.varied, *figure.flags}
        varied.update(*variants_of(figure, scale).values())
        for flag, agent in product(overrides, agents_of(figure, scale)):
            if flag in varied:
                shown = f"--{flag.replace('_', '-')}"
                raise BadInput(f"{shown} is the figure's own: {name} cannot be asked with another.")
            check_flag(agent, flag)
            check_value(agent, flag, overrides[flag])


def read_overrides(words: list[str]) -> dict:
    """--learning-rate 1e-3 --no-cuda -> {"learning_rate": 0.001, "cuda": False}. Raises BadInput for anything else."""
    found = {}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise BadInput(f"after -- there are flags of agents and their values: {word} is none.")
        name = word[2:].replace("-", "_")
        if words and not words[0].startswith("--"):
            value = words.pop(0)
            try:
                found[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[name] = value
        else:
            found[name.removeprefix("no_")] = not name.startswith("no_")
    return found


def claim_folder(folder: Path, scale: str, overrides: dict):
    """Make the folder of a plan, or go on in it. Raises BadInput if it holds runs of another."""
    plan = {"scale": scale, "flags": overrides}
    path = folder / "plan.json"
    try:
        if path.exists():
            other = json.loads(path.read_text())
            if other != plan:
                flags = other["flags"] or "no flags"
                raise BadInput(f"{folder} has runs of another plan, --scale {other['scale']} with {flags}: --folder.")
        elif folder.exists() and {path.name for path in folder.iterdir()} - {"figures"}:  # of a record's runs
            raise BadInput(f"{folder} is not empty, and no folder of experiments: name another with --folder.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plan))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path} cannot be used: {error}.") from None
