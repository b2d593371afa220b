"""Agents are files, not a package: the tests load each by its path, as a user's copy would be."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
AGENTS = sorted((ROOT / "agents").glob("*.py"))
ONLINE = [path for path in AGENTS if path.stem != "cql_offline"]


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


@pytest.fixture(params=ONLINE, ids=lambda path: path.stem)
def agent(request):
    """The module of every agent that plays, in turn."""
    return load(request.param)


@pytest.fixture
def dqn():
    return load(ROOT / "agents" / "dqn.py")


@pytest.fixture
def qrdqn():
    return load(ROOT / "agents" / "qrdqn.py")


@pytest.fixture
def rainbow():
    return load(ROOT / "agents" / "rainbow.py")


@pytest.fixture
def iqn():
    return load(ROOT / "agents" / "iqn.py")


@pytest.fixture
def der():
    return load(ROOT / "agents" / "der.py")


@pytest.fixture
def drq_eps():
    return load(ROOT / "agents" / "drq_eps.py")


@pytest.fixture
def spr():
    return load(ROOT / "agents" / "spr.py")


@pytest.fixture(params=["der", "drq_eps", "spr"])
def efficient(request):
    """The module of every agent of the Atari 100k benchmark in turn."""
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
    }
    args = make_args(module, **flags)
    torch.manual_seed(args.seed)
    return getattr(module, names[name_of(module)])(obs_shape, num_actions, args)


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
    if name_of(module) == "spr":
        small["spr_steps"] = 2  # --n-step may be 2 in a test
    return module.Args(**(small | changes))
