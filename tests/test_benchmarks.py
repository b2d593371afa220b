"""The benchmarks measure what they say; their figures are for a quiet machine."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load, make_args
from torch.utils.tensorboard import SummaryWriter

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.fixture
def script(monkeypatch):
    """A function that imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_explains_itself(name, script, capsys):
    module = script(name)
    with pytest.raises(SystemExit) as stop:
        module.tyro.cli(module.Args, args=["--help"], description=module.__doc__)
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in module.__doc__


# ---- curve.py
@pytest.mark.parametrize("flags, words", [({"batch_size": 8}, "batch 8"), ({"num_envs": 4}, "4 games")])
def test_a_curve_of_every_game(script, tmp_path, monkeypatch, flags, words):
    """Of agents with a batch, and of those with many games, two of which end in one step."""
    curve = script("curve")
    folder = tmp_path / "run"
    with SummaryWriter(folder) as writer:
        for step, score in [(100, 1.0), (100, 3.0), (250_000, 5.0)]:
            writer.add_scalar("charts/episodic_return", score, step)
    flags = {"env_id": "ALE/Pong-v5", "seed": 7} | flags
    (folder / "args.json").write_text(json.dumps({"agent": "some", "args": flags, "frames_per_step": 4}))
    drawn = []
    real = curve.plt.subplots
    monkeypatch.setattr(curve.plt, "subplots", lambda **given: drawn.append(real(**given)) or drawn[0])
    curve.main(curve.Args((folder,), tmp_path / "curve.png", window=2))
    games, means = drawn[0][1].lines
    np.testing.assert_allclose(games.get_xydata(), [[0.0004, 1.0], [0.0004, 3.0], [1.0, 5.0]])
    np.testing.assert_allclose(means.get_xydata(), [[0.0004, 2.0], [1.0, 4.0]])
    assert means.get_label() == f"some, {words}, seed 7: mean of 2 training games"
    assert (tmp_path / "curve.png").stat().st_size > 5_000


def test_curves_are_told_apart(script):
    flags = {"env_id": "ALE/Pong-v5", "seed": 7, "batch_size": 8, "n_step": 3, "gamma": 0.99}
    records = [{"agent": "dqn", "args": flags}, {"agent": "dqn", "args": flags | {"n_step": 1, "seed": 8}}]
    labels = [script("curve").label_of(record, records) for record in records]
    assert labels == ["dqn, batch 8, n step 3, seed 7", "dqn, batch 8, n step 1, seed 8"]


def test_curves_of_two_games(script, tmp_path, monkeypatch):
    """Each has its game in its label, and the title has both."""
    curve = script("curve")
    for game in ("Breakout", "Asterix"):
        with SummaryWriter(tmp_path / game) as writer:
            writer.add_scalar("charts/episodic_return", 1.0, 100)
        flags = {"env_id": f"MinAtar/{game}-v1", "seed": 7, "batch_size": 8}
        (tmp_path / game / "args.json").write_text(json.dumps({"agent": "dqn", "args": flags, "frames_per_step": 1}))
    drawn = []
    real = curve.plt.subplots
    monkeypatch.setattr(curve.plt, "subplots", lambda **given: drawn.append(real(**given)) or drawn[0])
    curve.main(curve.Args((tmp_path / "Breakout", tmp_path / "Asterix"), tmp_path / "curve.png"))
    axes = drawn[0][1]
    labels = [text.get_text().partition(":")[0] for text in axes.get_legend().get_texts()]
    assert labels == ["MinAtar/Breakout-v1, dqn, batch 8, seed 7", "MinAtar/Asterix-v1, dqn, batch 8, seed 7"]
    assert axes.get_title() == "MinAtar/Asterix-v1, MinAtar/Breakout-v1"


def test_no_curve_of_nothing(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        script("curve").main(script("curve").Args((), tmp_path / "curve.png"))
    assert refusal.value.code == 2
    assert capsys.readouterr().err == "error: name a run folder.\n"
    assert not (tmp_path / "curve.png").exists()


def test_no_curve_of_what_is_no_run(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        script("curve").main(script("curve").Args((tmp_path,), tmp_path / "curve.png"))
    assert refusal.value.code == 2
    assert "is no run folder" in capsys.readouterr().err
    assert not (tmp_path / "curve.png").exists()


# ---- speed.py
def test_the_clock_counts_learning_steps_alone(script, monkeypatch):
    speed = script("speed")
    now = [0.0]
    sent = []
    turns = [10, 3, 0]  # seconds of each

    def wait_for_a_turn():
        now[0] += 1_000  # others have theirs
        return turns.pop(0)

    channel = SimpleNamespace(send=sent.append, recv=wait_for_a_turn)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    clock = speed.Clock(channel)

    def tick(times: int, seconds_each: float):
        for _ in range(times):
            now[0] += seconds_each
            clock.tick()

    tick(1_000, 100.0)  # random steps, however slow
    assert turns == [3, 0]
    tick(20, 0.5)
    assert sent == [2.0]
    with pytest.raises(speed.Enough):
        tick(16, 0.25)
    assert sent == [2.0, 4.0]


def test_contenders_take_turns(script, monkeypatch):
    """By turns of --seconds, in turned order every other round; the warm-up doesn't count."""
    speed = script("speed")
    turns = []

    class Contender:
        def __init__(self, name):
            self.name = name

        def turn(self, seconds):
            turns.append((self.name, seconds))
            return float(len(turns))

        def end(self):
            turns.append((self.name, 0))

    monkeypatch.setattr(speed, "Contender", Contender)
    speeds = speed.measure({"a": ("A",), "b": ("B",)}, speed.Args(rounds=2, seconds=2, warm_up=5))
    assert turns == [("A", 5), ("B", 5), ("A", 2), ("B", 2), ("B", 2), ("A", 2), ("A", 0), ("B", 0)]
    assert speeds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


@pytest.mark.long
def test_a_learning_agent_is_measured(script):
    speed = script("speed")
    args = speed.Args(cuda=False, warm_up=0.01, seconds=0.05, rounds=2)
    who = speed.contenders("dqn", "MinAtar/Breakout-v1", 8, args)
    speeds = speed.measure(who, args)
    assert [len(each) for each in speeds.values()] == [2]
    assert min(speeds["ours"]) > 0
    who["ours"] = (*who["ours"][:3], "MinAtar/Nothing-v1", *who["ours"][4:])
    with pytest.raises(RuntimeError, match="--env-id is MinAtar/Nothing-v1"):
        speed.measure(who, args)


@pytest.mark.long
def test_the_table_has_a_row_for_each_rival(script, tmp_path, capsys):
    speed = script("speed")
    small = {"agents": ("dqn", "der"), "games": ("ALE/Pong-v5",), "batch_sizes": (8,), "rounds": 2}
    quick = {"seconds": 0.2, "warm_up": 0.1, "threads": 1, "cuda": False}
    speed.main(speed.Args(**small, **quick, before=ROOT, out=tmp_path / "speed.json"))
    rows = re.findall(r"\| ALE/Pong-v5 \| (\w+) \| 8 \| [\d.]+ \| (\w+) ", capsys.readouterr().out)
    assert rows == [("dqn", "before"), ("dqn", "sb3"), ("der", "before")]
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["machine"]["threads"] == 1
    assert [len(speeds) for speeds in record["results"][0]["speeds"].values()] == [2, 2, 2]


def test_quartiles_take_two_rounds(script, capsys):
    with pytest.raises(SystemExit) as refusal:
        script("speed").main(script("speed").Args(rounds=1))
    assert refusal.value.code == 2
    assert "--rounds must be at least 2" in capsys.readouterr().err


# ---- overhead.py, checkpoint.py, soak.py
def test_priorities_are_measured(script, capsys):
    overhead = script("overhead")
    threads = torch.get_num_threads()
    overhead.measure_priorities(load(ROOT / "agents" / "rainbow.py"), overhead.Args(rows=1_000, draws=8))
    torch.set_num_threads(threads)
    assert "1,000" in capsys.readouterr().out


@pytest.mark.long
def test_checkpoints_are_measured_where_one_says(script, tmp_path, monkeypatch, capsys):
    """In a folder that is named relative to this one; nothing stays there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "agents"))
    (tmp_path / "disk").mkdir()
    checkpoint = script("checkpoint")
    checkpoint.main(checkpoint.Args(rows=100, rounds=1, steps=16, folder=Path("disk")))
    assert "read again in" in capsys.readouterr().out
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.long
def test_a_soak_that_is_too_short(script, tmp_path, capsys):
    """The replay is full before the end, but not as long as --settle."""
    soak = script("soak")
    with pytest.raises(SystemExit) as refusal:
        soak.main(soak.Args(agent="dqn", minutes=0.4, rows=1_100, out=tmp_path / "soak.png"))
    assert refusal.value.code == 2
    assert re.fullmatch(r"error: [\d,]+ steps fill no replay in time: .*\n", capsys.readouterr().err)
    assert not (tmp_path / "soak.png").exists()


# ---- learning.py
@pytest.mark.parametrize("setting", ["500k", "short", "100k"])
def test_agents_know_the_flags_of_their_benchmark(setting, script):
    learning = script("learning")
    args = learning.Args(setting)
    for agent in args.agents:
        flags = learning.FLAGS[setting] | learning.OWN_FLAGS.get(agent, {})
        module = load(ROOT / "agents" / f"{agent}.py")
        module.Args(env_id=args.games[0], total_timesteps=args.total_timesteps, **flags)


def test_results_of_other_settings_are_not_taken(script, monkeypatch, capsys):
    """DER of 100,000 steps is there with the settings of Atari 100k, not with those of the study."""
    learning = script("learning")
    monkeypatch.setattr(learning, "random_play", lambda env_id: np.zeros(1))
    for benchmark, is_there in (("100k", True), ("500k", False)):
        flags = {"agents": ("der",), "games": ("MinAtar/Breakout-v1",), "batch_sizes": (32,)}
        learning.main(learning.Args(benchmark, **flags, total_timesteps=100_000, table_only=True))
        (row,) = [row for row in capsys.readouterr().out.splitlines() if "| der |" in row]
        assert row.endswith("| - | -, -, - |") == (not is_there)


def test_a_finished_run_of_the_same_flags_is_found(script, dqn, tmp_path, monkeypatch):
    learning = script("learning")
    monkeypatch.chdir(tmp_path)
    run = dqn.train(make_args(dqn, total_timesteps=8))
    assert learning.find_run(tmp_path, "dqn", {"total_timesteps": 8, "seed": 1}) == tmp_path / run
    assert learning.find_run(tmp_path, "dqn", {"total_timesteps": 8, "seed": 2}) is None
    assert learning.find_run(tmp_path, "rainbow", {"total_timesteps": 8, "seed": 1}) is None
    (run / "finished").unlink()
    assert learning.find_run(tmp_path, "dqn", {"total_timesteps": 8, "seed": 1}) is None


# ---- floor.py
def test_the_parts_of_an_update_are_counted(script, capsys):
    """One round with a small product, of the smaller agent: 23.1 GFLOP, of which the augmentation has none."""
    floor = script("floor")
    floor.main(floor.Args(agent="sr_spr", rounds=1, matrix=256, cuda=False))
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    found = {row[0].removeprefix("| "): row[1:] for row in rows[1:]}
    assert list(found) == ["matrix product", "update", "augmentation", "roll-out"]
    assert float(found["update"][0]) == pytest.approx(23.1, abs=0.1)
    assert found["augmentation"][0] == "0.0"
    assert found["update"][3:] == ["100.0%", "100.0% |"]


# ---- atari100k.py
def test_runs_stand_beside_those_of_their_replay_ratio(script, tmp_path, capsys):
    atari100k = script("atari100k")
    for agent, flags, value in [
        ("bbf", {"replay_ratio": 8}, 20.0),
        ("sr_spr", {"replay_ratio": 8}, -3.0),
        ("der", {}, -13.9),
    ]:
        folder = tmp_path / agent
        writer = SummaryWriter(str(folder))
        writer.add_scalar("eval/episodic_return", value, 100_000)
        writer.close()
        flags |= {"env_id": "ALE/Pong-v5", "total_timesteps": 100_000, "seed": 1}
        (folder / "args.json").write_text(json.dumps({"agent": agent, "args": flags}))
        (folder / "finished").touch()
    atari100k.main(atari100k.Args(tuple(tmp_path.iterdir()), out=tmp_path / "figure.png"))
    rows = [row for row in capsys.readouterr().out.splitlines() if "Pong" in row]
    published = atari100k.read_published()
    theirs = published["BBF", "8", "Pong"]
    assert len(theirs) == 52
    below = sum(score < 20 for score in theirs)
    assert rows[0].startswith(f"| bbf, replay ratio 8, Pong | 1 | 20.00 | {np.median(theirs):.1f} | ")
    assert rows[0].endswith(f"| {below} of 52 |")
    assert rows[1].startswith("| der, Pong | 1 | -13.90 | ")
    assert rows[2].endswith(f"| {sum(score < -3 for score in published['SPR', '', 'Pong'])} of 100 |")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_results_that_are_there_are_not_made_again(script, monkeypatch, capsys):
    """In a fresh clone the offline table is complete: no recording is made, which would change what its scores mean."""
    offline = script("offline")
    for name in ("record", "measure"):
        monkeypatch.setattr(offline, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    monkeypatch.setattr(offline, "chance", lambda *_: "")  # slow
    offline.main(offline.Args())
    assert "| all | dqn | 1 | 8 |" in capsys.readouterr().out

    made = []
    monkeypatch.setattr(offline, "record", lambda args, game: made.append(game))
    monkeypatch.setattr(offline, "measure", lambda args, one: made.append(one["seed"]))
    monkeypatch.setattr(offline, "table", lambda args: None)
    offline.main(offline.Args(games=("MinAtar/Breakout-v1",), data=("all",), algorithms=("dqn",), seeds=4))
    assert made == ["MinAtar/Breakout-v1", 4, 4, 4, 4]
