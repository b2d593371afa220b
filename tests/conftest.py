"""Agents are files, not a package: the tests load each by its path, as a user's copy would be."""

import gzip
import importlib.util
import io
import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from sync import AGENTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

ROOT = Path(__file__).resolve().parent.parent
ON_POLICY = ("pqn", "ppo")
ONLINE = [path for path in AGENTS if path.stem not in ("cql_offline", *ON_POLICY)]  # with a replay of their games


def load(path: Path):
    name = f"agent_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("short", derandomize=True, max_examples=100, **CHECKS)
settings.register_profile("long", max_examples=10_000, **CHECKS)  # pytest --hypothesis-profile=long
settings.load_profile("short")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    # a run's logs are read in the order of their names, which are a second and a number
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10**9))


@pytest.fixture(params=ONLINE, ids=lambda path: path.stem)
def agent(request):
    """The module of every agent that plays, in turn."""
    return load(request.param)


def agent_fixture(name: str):
    return pytest.fixture(lambda: load(ROOT / "agents" / f"{name}.py"), name=name)


dqn = agent_fixture("dqn")
qrdqn = agent_fixture("qrdqn")
rainbow = agent_fixture("rainbow")
iqn = agent_fixture("iqn")
der = agent_fixture("der")
drq_eps = agent_fixture("drq_eps")
spr = agent_fixture("spr")
sr_spr = agent_fixture("sr_spr")
bbf = agent_fixture("bbf")
pqn = agent_fixture("pqn")
ppo = agent_fixture("ppo")


@pytest.fixture(params=["der", "drq_eps", "spr", "sr_spr", "bbf"])
def efficient(request):
    """The module of every agent of the Atari 100k benchmark in turn."""
    return load(ROOT / "agents" / f"{request.param}.py")


@pytest.fixture(params=ON_POLICY)
def on_policy(request):
    """The module of every agent without a replay in turn."""
    return load(ROOT / "agents" / f"{request.param}.py")


def name_of(module) -> str:
    """The agent's name: its file's stem."""
    return module.__name__.removeprefix("agent_")


def make_network(module, obs_shape=(4, 84, 84), num_actions=6, **flags):
    """The agent's network, as `train` makes it with this --seed; MinAtar's shape is (10, 10, channels)."""
    names = {
        "dqn": "QNetwork",
        "qrdqn": "QuantileNetwork",
        "rainbow": "RainbowNetwork",
        "iqn": "ImplicitQuantileNetwork",
        "der": "C51Network",
        "drq_eps": "DuelingNetwork",
        "spr": "SPRNetwork",
        "sr_spr": "SRSPRNetwork",
        "bbf": "BBFNetwork",
        "pqn": "PQNetwork",
        "ppo": "ActorCritic",
    }
    args = make_args(module, **flags)
    torch.manual_seed(args.seed)
    return getattr(module, names[name_of(module)])(obs_shape, num_actions, args)


def optimizer_of(module):
    """The class whose `step` a test may replace (AdamW's own keeps what Adam's was when the first one was made)."""
    return torch.optim.AdamW if name_of(module) == "bbf" else torch.optim.Adam


def scalars(folder):
    """{tag: [(step, value), ...]} of a run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(folder):
    """The weights of a run's model.pt by name."""
    return torch.load(folder / "model.pt", weights_only=True)["weights"]


def make_args(module, **changes):
    """The agent's flags at a size that a test can run: MinAtar, a small replay, no evaluation."""
    if name_of(module) in ON_POLICY:
        small = {"env_id": "MinAtar/Breakout-v1", "cuda": False, "total_timesteps": 96, "eval_episodes": 0}
        small |= {"num_envs": 3, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "diagnostics_frequency": 0}
        return module.Args(**(small | changes))
    small = {
        "env_id": "MinAtar/Breakout-v1",
        "cuda": False,
        "total_timesteps": 300,
        "buffer_size": 1_000,
        "learning_starts": 100,
        "train_frequency": 4,
        "target_network_frequency": 50,
        "exploration_steps": 100,
        "batch_size": 8,
        "eval_episodes": 0,
    }
    if name_of(module) in ("spr", "sr_spr", "bbf"):
        small["spr_steps"] = 2  # --n-step may be 2 in a test
    if name_of(module) in ("sr_spr", "bbf"):
        del small["train_frequency"], small["target_network_frequency"]
        small |= {"replay_ratio": 1, "reset_interval": 0}
    if name_of(module) == "bbf":
        small |= {"schedule_updates": 30, "width_scale": 1}
    return module.Args(**(small | changes))


# ---- what is refused
def files_and_folders():
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.fixture
def refused(capsys):
    """A function that calls another and returns the one sentence with which it refused; it has changed no file."""

    def call(function, *args, may_write=False, **flags):
        before = files_and_folders()
        with pytest.raises(SystemExit) as refusal:
            function(*args, **flags)
        error = capsys.readouterr().err
        assert refusal.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert may_write or files_and_folders() == before
        return error

    return call


class Bomb:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return os.system, ("touch it_ran",)


# ---- runs that are stopped
def in_call(patch, owner, name, number, action):
    """Do something in the call of this number of a function, counted from now."""
    real = getattr(owner, name)
    numbers = itertools.count(1)

    def spied(*args):
        if next(numbers) == number:
            action()
        return real(*args)

    patch.setattr(owner, name, spied)


def stop_in_call(module, patch, owner, name, number):
    in_call(patch, owner, name, number, lambda: module.STOPPED_BY.append(signal.SIGTERM))


def stop_in_step(module, patch, number):
    stop_in_call(module, patch, module.FrameReplay, "add", number)


def stopped(module, args, when, *place):
    """Train until `when` ends the run; return the folder."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(module, "STOPPED_BY", [])
        when(module, patch, *place)
        module.train(args)
    assert exit_.value.code == 128 + signal.SIGTERM
    return max(Path("runs").iterdir())


def flat(value, name=""):
    """{place: value} of nested containers; a tensor as its type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return {name: (value.dtype, value.shape, value.numpy().tobytes())}
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    found = {}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        found.update(flat(part, f"{name}/{key}"))
    return found


def contents(folder):
    """A checkpoint by place, but for the flags that do not change a run's course."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for flag in ("resume", "checkpoint_frequency"):
        del state["args"][flag]
    return flat(state)


def logged(folder):
    """{tag: [(step, value), ...]}, but for the speed."""
    found = scalars(folder)
    found.pop("charts/SPS", None)
    return found


def check_same(one, other):
    """Two runs ended alike: weights, moments, replay, priorities, random states, counters and log."""
    left, right = contents(one), contents(other)
    assert left.keys() == right.keys()
    assert [place for place in left if left[place] != right[place]] == []
    assert {"/random/torch", "/optimizer/state/0/exp_avg"} < left.keys()
    assert logged(one) == logged(other)
    assert (one / "finished").exists()
    assert (other / "finished").exists()


# ---- the files of a dataset
NAMES = ["$store$_observation", "$store$_action", "$store$_reward", "$store$_terminal", "add_count", "invalid_range"]


def read_array(path):
    with gzip.open(path, "rb") as file:
        return np.load(io.BytesIO(file.read()), allow_pickle=False)


def write_array(path, array):
    with gzip.open(path, "wb", compresslevel=1) as file:
        np.save(file, array)
