"""What part of a game was seen: samples of runs, the grid, and the command."""

import json
import sys

import numpy as np
import pytest
from conftest import make_args

from analysis import __main__ as command_line
from analysis import coverage
from analysis.runs import BadInput


def write_run(path, obs, **flags):
    """A folder with two samples of what a run saw."""
    (path / "features").mkdir(parents=True)
    flags = {"env_id": "MinAtar/Breakout-v1", "seed": 1, "total_timesteps": 10, "num_envs": 8, "num_steps": 1} | flags
    (path / "args.json").write_text(json.dumps({"agent": "pqn", "args": flags, "frames_per_step": 1}))
    half = len(obs) // 2
    for step, part in ((900, obs[:half]), (1000, obs[half:])):
        features = np.full((len(part), 3), step, np.float32)
        np.savez_compressed(path / "features" / f"{step}.npz", obs=part, features=features)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["analysis", "coverage", *map(str, words)])
    command_line.main()


def test_atari_s_newest_frame_in_a_quarter_of_its_size():
    obs = np.random.default_rng(0).integers(256, size=(3, 4, 84, 84), dtype=np.uint8)
    flat = coverage.flat_pictures(obs)
    assert flat.shape == (3, 21 * 21)
    block = obs[2, 3, 4 * 20 : 4 * 21, 4 * 7 : 4 * 8]
    assert flat[2, 20 * 21 + 7] == pytest.approx(block.mean() / 255)


def test_samples_of_several_runs(tmp_path):
    """In the order of their steps; runs of one setting together, settings apart."""
    obs = np.random.default_rng(0).random((6, 10, 10, 4)) < 0.5
    write_run(tmp_path / "a", obs)
    write_run(tmp_path / "b", ~obs, seed=2)
    write_run(tmp_path / "c", obs, num_envs=128)
    found = coverage.read_settings((tmp_path,), ["agent", "num_envs"], "observations")
    assert list(found) == ["MinAtar/Breakout"]
    settings = found["MinAtar/Breakout"]
    assert {label: len(rows) for label, rows in settings.items()} == {"pqn, num envs 8": 12, "pqn, num envs 128": 6}
    assert np.array_equal(settings["pqn, num envs 8"], np.concatenate([obs, ~obs]).reshape(12, -1))
    features = coverage.read_settings((tmp_path / "a",), ["agent"], "features")["MinAtar/Breakout"]["pqn"]
    assert features.tolist() == [[900] * 3] * 3 + [[1000] * 3] * 3


def test_of_a_long_run_every_so_many_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "TIMES", 3)
    (tmp_path / "features").mkdir()
    for step in range(11):
        np.savez(tmp_path / f"features/{step}.npz", obs=np.zeros((1, 10, 10, 4), bool), features=[[step]])
    assert coverage.samples_of(tmp_path, "features").ravel().tolist() == [0, 3, 6, 9]


def test_shares_of_cells_by_hand():
    """Over the range of all settings: four corners, one point, and the middle line of cells."""
    corners = np.array([[0.0, 0.0], [0.0, 100.0], [100.0, 0.0], [100.0, 100.0]])
    line = np.stack([np.arange(50) * 2.0 + 1, np.full(50, 51.0)], axis=1)
    edge = np.array([[100.0, 100.0], [99.0, 99.0]])  # the largest is in the last cell, too
    found = coverage.shares({"corners": corners, "point": np.full((7, 2), 3.0), "line": line, "edge": edge})
    assert found == pytest.approx({"corners": 4 / 2500, "point": 1 / 2500, "line": 50 / 2500, "edge": 1 / 2500})


def test_wrong_input(tmp_path, monkeypatch, capsys):
    obs = np.zeros((4, 10, 10, 4), bool)
    write_run(tmp_path / "good", obs)
    write_run(tmp_path / "bad" / "damaged", obs)
    (tmp_path / "bad" / "damaged" / "features" / "900.npz").write_bytes(b"no zip")
    write_run(tmp_path / "full_disk", obs)
    (tmp_path / "full_disk" / "features" / "900.npz").write_bytes(b"")
    write_run(tmp_path / "empty", obs)
    for path in (tmp_path / "empty" / "features").iterdir():
        path.rename(path.with_name("copy_of_" + path.name))  # not an agent's
    cases = {
        (tmp_path / "empty",): "has no features: they are saved by pqn.py and ppo.py with --save-features.",
        (tmp_path / "bad",): "900.npz cannot be read: remove it.",
        (tmp_path / "full_disk",): "900.npz cannot be read: remove it.",
        (tmp_path / "good", "--by", "colour"): "has no flag colour",
        (tmp_path / "good", "--out", "coverage.txt"): "--out is coverage.txt",
        (tmp_path / "good", "--rows", "1"): "--rows must be from 2",
        (tmp_path / "none",): "none does not exist.",
    }
    for words, said in cases.items():
        with pytest.raises(SystemExit) as refusal:
            call(monkeypatch, *words)
        assert refusal.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
        assert error.count("\n") == 1
    with pytest.raises(BadInput):
        coverage.samples_of(tmp_path / "empty", "observations")


@pytest.mark.long
def test_from_runs_to_a_picture(on_policy, monkeypatch, capsys):
    """UMAP itself: a setting that sees one picture alone covers least."""
    flags = {"save_features": True, "diagnostics_frequency": 24, "total_timesteps": 240, "num_minibatches": 1}
    for num_envs in (1, 3):
        on_policy.train(make_args(on_policy, num_envs=num_envs, num_steps=24 // num_envs, **flags))
    write_run(on_policy.Path("runs/same"), np.zeros((300, 10, 10, 4), bool), num_envs=1000, num_steps=1)
    capsys.readouterr()
    call(monkeypatch, "runs", "--by", "num_envs,seed", "--out", "seen.png")
    rows = capsys.readouterr().out.splitlines()[2:-1]
    shares = {row.split(" | ")[1]: float(row.split(" | ")[3].rstrip("% |")) for row in rows}
    shares = {label.removesuffix(", seed 1"): share for label, share in shares.items()}
    assert set(shares) == {"num envs 1", "num envs 3", "num envs 1000"}
    assert shares["num envs 1000"] < min(shares["num envs 1"], shares["num envs 3"])
    assert on_policy.Path("seen.png").stat().st_size > 10_000
