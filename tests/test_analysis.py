"""From run folders and tables to the report: what is read, what is said, and what is refused."""

import contextlib
import csv
import html
import json
import os
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, make_args, name_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from analysis import __main__ as command
from analysis import figures, report, results, runs, scores
from analysis.runs import BadInput


def write_run(folder, agent="dqn", game="ALE/Pong-v5", seed=1, steps=1_000, games=50, level=0.0, flags=None, **record):
    """A run folder as an agent writes it: `games` games in `steps` agent steps, returns about `level`."""
    rng = np.random.default_rng([seed, len(game), int(10 * level) % 1000])
    folder.mkdir(parents=True)
    flags = {"env_id": game, "seed": seed, "total_timesteps": 1_000, "batch_size": 32, **(flags or {})}
    record = {"agent": agent, "args": flags, "frames_per_step": 1 if "MinAtar" in game else 4, **record}
    (folder / "args.json").write_text(json.dumps(record))
    writer = SummaryWriter(str(folder))
    writer.add_text("hyperparameters", "a table")
    ends = np.sort(rng.choice(steps, games, replace=False)) + 1
    for step in ends.tolist():
        writer.add_scalar("charts/episodic_return", level + rng.normal(), step)
        writer.add_scalar("charts/episodic_length", 7, step)
    for step in range(100, steps + 1, 100):
        writer.add_scalar("charts/SPS", 3.0, step)
        for tag in ("loss_variance", "gradient_norm", "representation_norm", "srank", "dormant_neurons"):
            writer.add_scalar(f"diagnostics/{tag}", rng.uniform(1, 2), step)
    writer.add_scalar("eval/episodic_return", level + 5, steps)
    writer.close()
    return folder


def log_of(folder):
    return next(folder.glob("events.out.tfevents.*"))


def run_command(monkeypatch, capsys, *arguments):
    """Run python -m analysis in this process; return its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["analysis", *map(str, arguments)])
    status = 0
    try:
        command.main()
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs python -m analysis, and returns the one sentence with which it refuses."""

    def call(*arguments):
        status, _, error = run_command(monkeypatch, capsys, *arguments)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return call


def study_of_folders(folders, by=("agent",), normalize="human"):
    return scores.make_study([scores.run_of(folder, 50, False) for folder in folders], list(by), normalize)


# ---- reading a folder
def test_a_log_is_read_as_tensorboard_reads_it(tmp_path):
    folder = write_run(tmp_path / "run", steps=3_000, games=500)
    found = runs.read_folder(folder, None)
    reference = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reference.Reload()
    assert len(found.series) == 7 and found.last_step == 3_000 and found.finished and not found.cut_off
    for tag, series in found.series.items():
        events = reference.Scalars(tag)
        assert series.steps.tolist() == [event.step for event in events]
        assert series.values.tolist() == [event.value for event in events]
        began = reference.FirstEventTimestamp()
        assert series.times.tolist() == pytest.approx([event.wall_time - began for event in events], abs=1e-6)


def test_values_of_every_size(tmp_path):
    """Steps of one to five bytes, values that are not finite, tags as long as the fast path takes and longer."""
    folder = write_run(tmp_path / "run")
    log_of(folder).unlink()
    steps = [0, 1, 127, 128, 16_384, 2_097_152, 2**31, 2**40]
    values = [0.0, -1.5, 1e30, -1e-30, 3.0, 7.0, np.inf, 5.0]
    writer = SummaryWriter(str(folder))
    for tag in ("diagnostics/z", "diagnostics/" + "x" * 80, "diagnostics/" + "y" * 150):
        for step, value in zip(steps, values, strict=True):
            writer.add_scalar(tag, value, step)
    writer.close()
    found = runs.read_folder(folder, None)
    assert len(found.series) == 3
    for series in found.series.values():
        assert series.steps.tolist() == steps
        np.testing.assert_array_equal(series.values, np.float32(values))


def test_a_run_taken_up_again_supersedes_what_it_had_logged(tmp_path):
    """A second log that starts at step 600: what the first said of steps from 600 on did not happen.

    But the evaluation of the checkpoint's step, which is made anew, counts once.
    """
    folder = write_run(tmp_path / "run", games=100)
    whole = runs.read_folder(folder, None).series["charts/episodic_return"]
    first = log_of(folder)
    first.rename(folder / "events.out.tfevents.0000000001.a")
    for number, (purge_step, step) in enumerate([(600, 700), (701, 700)]):
        writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=str(number))
        writer.add_scalar("eval/episodic_return", 5.0, step)
        if number == 0:
            writer.add_scalar("charts/episodic_return", 99.0, step)
        writer.close()
    found = runs.read_folder(folder, None).series
    returns = found["charts/episodic_return"]
    assert returns.steps.tolist() == [*whole.steps[whole.steps < 600].tolist(), 700]
    assert returns.values[-1] == 99.0
    assert found["eval/episodic_return"].steps.tolist() == [700]


def test_the_cache_notices_what_changed(tmp_path):
    folder, cache = write_run(tmp_path / "run"), tmp_path / "cache"
    first = runs.read_folder(folder, cache)
    log = log_of(folder)
    whole = log.read_bytes()
    stamp = log.stat()
    log.write_bytes(b"\0" * stamp.st_size)  # not to be read, as name, size and time are those of before
    os.utime(log, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = runs.read_folder(folder, cache)
    for tag in first.series:
        for name in ("steps", "values", "times"):
            np.testing.assert_array_equal(getattr(first.series[tag], name), getattr(again.series[tag], name))
    assert again.record == first.record and again.finished == first.finished
    writer = SummaryWriter(str(tmp_path / "more"))
    writer.add_scalar("charts/episodic_return", 1234.0, 5_000)
    writer.close()
    log.write_bytes(whole + log_of(tmp_path / "more").read_bytes())
    assert runs.read_folder(folder, cache).series["charts/episodic_return"].values[-1] == 1234.0
    next(cache.iterdir()).write_bytes(b"damaged")
    assert runs.read_folder(folder, cache).series["charts/episodic_return"].values[-1] == 1234.0


def test_the_last_record_of_a_killed_run_is_cut_off(tmp_path):
    folder = write_run(tmp_path / "run")
    log = log_of(folder)
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    found = runs.read_folder(folder, None)
    assert found.cut_off and "eval/episodic_return" not in found.series
    assert len(found.series["charts/episodic_return"].steps) == 50


@pytest.mark.parametrize("place", ["length", "value", "middle"])
def test_a_flipped_bit_is_found(tmp_path, place):
    folder = write_run(tmp_path / "run")
    log = log_of(folder)
    data = bytearray(log.read_bytes())
    at = data.find(b"charts/episodic_return", len(data) // 2)
    start = data.rfind(b"\x09", 0, at - 12)
    data[{"length": start - 9, "value": at + 24, "middle": at - 5}[place]] ^= 4
    log.write_bytes(bytes(data))
    with pytest.raises(BadInput, match=rf"{log.name}.* is broken at byte"):
        runs.read_folder(folder, None)


def test_broken_folders_are_named(tmp_path, refused):
    folder = write_run(tmp_path / "runs" / "one")
    out = ["--out", tmp_path / "out"]
    record = (folder / "args.json").read_text()
    assert "does not exist" in refused(tmp_path / "nothing", *out)
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused(tmp_path / "empty", *out)
    for text, words in (
        ("", "line 1"),
        ('{\n"agent": "dqn",\n}', "line 3"),
        ('{"agent": "dqn", "args": {}}', "no record of a run"),
    ):
        (folder / "args.json").write_text(text)
        error = refused(tmp_path / "runs", *out)
        assert f"{folder / 'args.json'}" in error and words in error
    (folder / "args.json").write_bytes(b"\xff\xfe{")
    assert "is no text" in refused(tmp_path / "runs", *out)
    (folder / "args.json").write_text(record)
    log = log_of(folder)
    log.write_bytes(b"")
    assert f"{log} is empty" in refused(tmp_path / "runs", *out)
    log.write_bytes(b"not an event file, but long enough to look like one")
    assert f"{log} is broken" in refused(tmp_path / "runs", *out)
    log.unlink()
    assert "holds no TensorBoard log" in refused(tmp_path / "runs", *out)
    assert not (tmp_path / "out" / "report.html").exists()


# ---- scores of a run
def test_scores_of_iterations_against_a_loop(tmp_path):
    """Mean of the games that ended in each iteration; an iteration without any repeats the one before."""
    folder = runs.read_folder(write_run(tmp_path / "run", steps=1_037, games=30), None)
    series = folder.series["charts/episodic_return"]
    run = scores.run_of(folder, 50, evaluation=False)
    expected, last = {}, None
    for number in range(folder.last_step // 50):
        inside = [v for s, v in zip(series.steps, series.values, strict=True) if 50 * number < s <= 50 * (number + 1)]
        last = np.mean(inside) if inside else last
        if last is not None:
            expected[4 * 50 * (number + 1)] = last
    assert run.frames.tolist() == list(expected) and run.scores.tolist() == pytest.approx(list(expected.values()))
    assert any(a == b for a, b in zip(run.scores, run.scores[1:], strict=False))  # one was empty
    assert (np.diff(run.hours) >= 0).all()
    evaluated = scores.run_of(folder, 50, evaluation=True)
    assert evaluated.frames.tolist() == [4 * 1_037] and evaluated.scores.tolist() == [5.0]


def table_of(tmp_path, text):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    return path


HEADER = "agent,game,seed,frames,score\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: the header lacks the column agent, game, seed, frames, score"),
        ("agent,game,seed,score\nDQN,Pong,1,2\n", "line 1: the header lacks the column frames"),
        ("agent,game,seed,frames,score,score\n", "line 1: the header names a column twice"),
        (HEADER, "has no row"),
        (HEADER + "DQN,Pong,1,4,2\nDQN,Pong,2,4\n", "line 3: 4 cells, and 5 columns"),
        (HEADER + "DQN,Pong,1,4,nan\n", "line 2: the score is nan"),
        (HEADER + "DQN,Pong,1,4,\n", "line 2: seed and frames must be whole numbers"),
        (HEADER + "DQN,Pong,1,-4,2\n", "line 2: the score is 2.0 at -4 frames"),
        (HEADER + ",Pong,1,4,2\n", "line 2: agent or game is empty"),
        (HEADER + "DQN,Pong,1,4,2\nDQN,Pong,1,8,2\nDQN,Pong,1,4,3\n", "line 4: repeats line 2"),
        (HEADER + 'DQN,"Pong,1,4,2\n', "line"),
    ],
)
def test_wrong_tables_are_named_with_their_line(tmp_path, refused, text, words):
    path = table_of(tmp_path, text)
    error = refused("--scores", path, "--out", tmp_path / "out")
    assert str(path) in error and words in error
    assert list(tmp_path.iterdir()) == [path]  # nothing is half-written


def test_a_broken_archive_is_named(tmp_path):
    path = tmp_path / "scores.csv.gz"
    path.write_bytes((scores.DATA / "atari100k_published.csv.gz").read_bytes()[:5_000])
    with pytest.raises(BadInput, match=r"scores\.csv\.gz could not be read"):
        scores.read_scores(path)


def rows(agent, game, seeds, frames, score, **settings):
    """Lines of a table; `score` is a function of seed and frames."""
    extra = "".join(f",{value}" for value in settings.values())
    return "".join(f"{agent},{game},{s},{f},{score(s, f)}{extra}\n" for s in seeds for f in frames)


def study(tmp_path, text, by=("agent",), normalize="human", header=HEADER):
    return scores.make_study(scores.read_scores(table_of(tmp_path, header + text)), list(by), normalize)


def test_unequal_lengths_are_cut_and_it_is_said(tmp_path):
    text = rows("A", "Pong", [1, 2], [100, 200, 300], lambda s, f: f)
    text += rows("B", "Pong", [1], [100, 200], lambda s, f: f)
    found = study(tmp_path, text)
    assert found.frames.tolist() == [100, 200]
    assert [note for note in found.notes if "Cut to 200 frames" in note and "300" in note and "B" in note]


def test_points_that_not_all_runs_have_are_left_out_and_it_is_said(tmp_path):
    seeds = [1, 2, 3, 4, 5]
    text = rows("A", "Pong", seeds, [100, 200, 300], lambda s, f: f)
    found = study(tmp_path, text + rows("B", "Pong", seeds, [100, 300], lambda s, f: f))
    assert found.frames.tolist() == [100, 300]
    assert found.notes == ["Left out 1 of 3 points in time, which not all runs have."]
    with pytest.raises(BadInput, match="no number of frames in common"):
        study(tmp_path, text + rows("B", "Pong", seeds, [50], lambda s, f: f))


def test_no_run_ends_where_all_have_a_score(tmp_path):
    """Evaluations at other steps: nothing can be said of runs that are no longer than that."""
    text = rows("A", "Pong", [1, 2, 3, 4, 5], [100, 200, 250], lambda s, f: f)
    found = study(tmp_path, text + rows("B", "Pong", [1, 2, 3, 4, 5], [100, 200, 270], lambda s, f: f))
    assert found.notes[-1] == "Cut to 200 frames, which all runs have; the longest have 270."


def test_missing_games_and_seeds_are_listed_by_name(tmp_path):
    seeds = [1, 2, 3, 4, 5, 6]
    text = rows("A", "Pong", seeds, [100], lambda s, f: s)
    text += rows("A", "Breakout", [1, 3, 4, 5, 6], [100], lambda s, f: s)
    text += rows("B", "Pong", [*seeds, 7], [100], lambda s, f: s)
    found = study(tmp_path, text)
    assert found.games == ["Pong"]
    assert "B: no run of Breakout; left out of every comparison." in found.notes
    assert "A: no seed 7 of Pong." in found.notes  # another setting has it
    text += rows("B", "Breakout", seeds, [100], lambda s, f: s)
    found = study(tmp_path, text)
    assert found.games == ["Breakout", "Pong"]
    assert "A: no seed 2, 7 of Breakout." in found.notes
    assert [len(found.groups[0].raw[game]) for game in found.games] == [5, 6]
    text += rows("B", "Breakout", [8, 9, 11], [100], lambda s, f: s)
    text += rows("B", "Pong", [8, 9, 11], [100], lambda s, f: s)
    assert "A: no seed 7 to 9, 11 of Pong." in study(tmp_path, text).notes
    text += rows("A", "Breakout", [2], [100], lambda s, f: s)
    assert "A: no seed 7 to 9, 11 of any of 2 games." in study(tmp_path, text).notes
    for setting in "AB":
        text += rows(setting, "Qbert", [*seeds, 7, 8, 9, 11], [100], lambda s, f: s)
    assert "A: no seed 7 to 9, 11 of Breakout, Pong." in study(tmp_path, text).notes


def test_games_without_a_human_score_are_listed(tmp_path):
    games = ["AirRaid", "Carnival", "ElevatorAction", "JourneyEscape", "Pooyan", "Pong"]
    text = "".join(rows("A", game, [1], [100], lambda s, f: 1.0) for game in games)
    found = study(tmp_path, text)
    assert found.scored == ["Pong"] and len(found.games) == 6
    assert any(f"no human score is known: {', '.join(games[:5])}." in note for note in found.notes)
    with pytest.raises(BadInput, match="no human score is known of AirRaid"):
        study(tmp_path, rows("A", "AirRaid", [1], [100], lambda s, f: 1.0))


def test_normalisation(tmp_path):
    """Human: Pong has random -20.7, human 14.6. Baseline: the mean of its runs is 1, random play 0."""
    text = rows("A", "Pong", [1, 2], [100], lambda s, f: 14.6)
    text += rows("B", "Pong", [1, 2], [100], lambda s, f: -20.7 + s)
    found = study(tmp_path, text)
    assert found.groups[0].normalised["Pong"].tolist() == [[1.0], [1.0]]
    np.testing.assert_allclose(found.groups[1].normalised["Pong"], [[1 / 35.3], [2 / 35.3]])
    found = study(tmp_path, text, normalize="baseline:B")
    np.testing.assert_allclose(found.groups[0].normalised["Pong"], 35.3 / 1.5)
    np.testing.assert_allclose(found.groups[1].normalised["Pong"], [[1 / 1.5], [2 / 1.5]])
    assert study(tmp_path, text, normalize="none").groups[1].normalised["Pong"].ravel().tolist() == [-19.7, -18.7]
    for wrong in ("baseline:C", "random"):
        with pytest.raises(BadInput, match="--normalize"):
            study(tmp_path, text, normalize=wrong)


def test_grouping_by_any_flag(tmp_path):
    header = "agent,game,seed,frames,score,batch_size,learning_rate,dueling\n"
    text = ""
    for size, rate in ((8, 1e-4), (8, 2e-4), (32, 1e-4)):
        text += rows("A", "Pong", [1, 2], [100], lambda s, f: s, batch_size=size, learning_rate=rate, dueling=True)
    found = study(tmp_path, text, ["agent", "batch_size", "learning_rate"], header=header)
    assert [group.label for group in found.groups] == [
        "A, batch size 8, learning rate 0.0001",
        "A, batch size 8, learning rate 0.0002",
        "A, batch size 32, learning rate 0.0001",
    ]
    assert results.default_reference(found).label == "A, batch size 32, learning rate 0.0001"
    with pytest.raises(BadInput, match="no run has 'colour'"):
        study(tmp_path, text, ["agent", "colour"], header=header)
    assert [group.label for group in study(tmp_path, text, ["dueling"], header=header).groups] == ["dueling True"]


def test_a_table_is_grouped_by_its_settings(no_figures, tmp_path, monkeypatch, capsys):
    """By those that have several values, and only where nothing says otherwise."""
    text = "agent,game,seed,frames,score,width,my-eps,batch_size\n"
    for width, batch_size in [(1, 8), (1, 32), (4, 8)]:
        text += f"dqn,Pong,1,400,1.0,{width},0.1,{batch_size}\n"
    path = table_of(tmp_path, text)
    for flags, settings in [
        ([], {"dqn, batch size 8, width 1", "dqn, batch size 32, width 1", "dqn, batch size 8, width 4"}),
        (["--by", "width", "--only", "batch_size=8"], {"width 1", "width 4"}),
        (["--by", "my-eps,batch-size", "--only", "my-eps=0.1", "batch-size=8"], {"my-eps 0.1, batch size 8"}),
    ]:
        out = tmp_path / f"out{len(flags)}"
        status, *_ = run_command(monkeypatch, capsys, "--scores", path, "--out", out, "--resamples", "50", *flags)
        assert status == 0
        assert {row["setting"] for row in table_in(out / "aggregates.csv")} == settings


def test_contribution(tmp_path, monkeypatch, capsys, refused):
    figure = figures.contribution([0.9, 0.5], 20)
    lines = {line.get_label(): line for line in figure.axes[0].lines if line.get_label().startswith("gamma")}
    assert list(lines) == ["gamma = 0.5", "gamma = 0.9"]
    value = 1.0
    for t in range(21):
        assert lines["gamma = 0.9"].get_xydata()[t].tolist() == pytest.approx([t, value])
        value *= 0.9
    assert [note.get_text() for note in figure.axes[0].texts] == ["2", "10"]  # 0.5^2 = 0.25, 0.9^10 = 0.349 < 1 / e

    out = tmp_path / "figures" / "contribution.svg"  # in a folder that is made
    assert run_command(monkeypatch, capsys, "contribution", "--gammas", "0.97", "1", "--out", out)[0] == 0
    assert "gamma = 0.97" in out.read_text()
    assert "--gammas must be" in refused("contribution", "--gammas", "1.1")
    assert "--steps must be" in refused("contribution", "--steps", "0")
    assert "must end in" in refused("contribution", "--out", tmp_path / "contribution")
    assert "in_a_file cannot be made: Not a directory" in refused("contribution", "--out", out / "in_a_file" / "x.png")


def test_different_protocols_in_a_group_raise_a_warning(tmp_path):
    sticky = {"sticky_actions": 0.25, "eval_episodes": 10, "save_features": True}
    write_run(tmp_path / "1", flags=sticky, packages={"ale-py": "0.12.1"})
    write_run(tmp_path / "2", seed=2, flags={"sticky_actions": 0.0, "eval_episodes": 5}, packages={"ale-py": "0.11"})
    write_run(tmp_path / "3", seed=3, flags={"sticky_actions": 0.0, "terminal_on_life_loss": True})
    notes = study_of_folders(runs.read_folders([tmp_path / name for name in "123"], None)).notes
    assert "Warning: dqn has runs of different --sticky-actions: 0.0, 0.25." in notes
    assert "Warning: dqn has runs of different --terminal-on-life-loss: None, True." in notes
    assert "Warning: dqn has runs of different versions of ale-py: 0.11, 0.12.1, None." in notes
    assert sum(note.startswith("Warning: dqn has runs of different") for note in notes) == 3


def test_unfinished_and_repeated_runs_are_marked(tmp_path):
    done = write_run(tmp_path / "done")
    half = write_run(tmp_path / "half", seed=2, steps=500)
    twice = write_run(tmp_path / "twice", seed=1)
    folders = runs.read_folders([done, half, twice], None)
    notes = study_of_folders(folders).notes
    assert f"Unfinished: {half}." in notes
    assert f"Left out, as another run has the same setting, game and seed: {done}." in notes
    assert any("Cut to 2,000 frames" in note for note in notes)
    folders[2].record["args"]["learning_rate"] = 0.1
    warnings = [note for note in study_of_folders(folders).notes if note.startswith("Warning: Left out")]
    assert "They differ in --learning-rate" in warnings[0]


def test_of_equally_long_runs_the_last_one_made_counts(tmp_path):
    """Whatever their names are."""
    older = write_run(tmp_path / "Pong__new__1__20250101-000000-000000", level=1.0)
    write_run(tmp_path / "Pong__dqn__1__20260101-000000-000000", level=2.0)
    notes = study_of_folders(runs.read_folders(runs.find_folders([tmp_path]), None)).notes
    assert any(f"has the same setting, game and seed: {older}." in note for note in notes)


def test_a_run_that_logged_nothing_at_its_end_is_finished_by_its_mark(tmp_path):
    """As a run without an evaluation whose steps are no multiple of 1,000."""
    folder = write_run(tmp_path / "run", steps=970)
    assert not runs.read_folder(folder, tmp_path / "cache").finished
    (folder / "finished").touch()
    for _ in range(2):  # the second time from the cache
        found = runs.read_folder(folder, tmp_path / "cache")
        assert found.finished and found.last_step == 1_000
    assert scores.run_of(found, 200, False).frames.tolist() == [800, 1600, 2400, 3200, 4000]


def test_agents_are_not_pooled_in_silence(tmp_path):
    text = rows("A", "Pong", [1, 2, 3], [100], lambda s, f: s) + rows("B", "Pong", [4, 5, 6], [100], lambda s, f: s)
    header = "agent,game,seed,frames,score,size\n"
    text = "".join(line + ",8\n" for line in text.splitlines())
    assert study(tmp_path, text, ["size"], header=header).notes == [
        "Warning: size 8 has runs of different agent: A, B.",
    ]


@pytest.mark.parametrize("name", ["setting", "source", "hours", "normalised"])
def test_every_other_column_is_a_setting(tmp_path, name):
    header = f"agent,game,seed,frames,score,{name}\n"
    text = rows("A", "Pong", [1], [100], lambda s, f: s, x=1) + rows("A", "Pong", [1], [100], lambda s, f: s, x=2)
    assert [group.label for group in study(tmp_path, text, [name], header=header).groups] == [f"{name} 1", f"{name} 2"]


def test_a_column_that_changes_within_a_run_is_refused(tmp_path):
    header = "agent,game,seed,frames,score,std\n"
    text = "".join(f"A,Pong,1,{f},1.0,{f / 7}\n" for f in (100, 200, 300))
    with pytest.raises(BadInput, match="'std' changes within a run"):
        study(tmp_path, text, header=header)


@pytest.fixture
def no_figures(monkeypatch):
    """For reports of which only the rest is looked at: figures take nearly all of their time."""
    monkeypatch.setattr(figures, "draw", lambda results: [])


def test_the_iteration_is_that_of_the_chosen_runs(no_figures, tmp_path, monkeypatch, capsys):
    """A short run that is not chosen must not shorten the iterations of those that are."""
    write_run(tmp_path / "runs" / "long", flags={"total_timesteps": 1_000})
    write_run(tmp_path / "runs" / "short", agent="iqn", steps=40, games=9, flags={"total_timesteps": 40})
    flags = ["--out", tmp_path / "out", "--resamples", "50", "--only", "agent=dqn"]
    status, output, _ = run_command(monkeypatch, capsys, tmp_path / "runs", *flags)
    assert status == 0 and "games that ended in 50 agent steps" in output


@pytest.mark.parametrize("trial", [{"agent": "dqn"}, {"agent": "dqn", "game": "ALE/Qbert-v5"}])
def test_the_iteration_is_that_of_compared_runs(no_figures, tmp_path, monkeypatch, capsys, trial):
    """A short trial of the same seed, or of a game that one setting alone has, shortens nothing: it is left out."""
    write_run(tmp_path / "runs" / "long")
    write_run(tmp_path / "runs" / "other", agent="iqn")
    write_run(tmp_path / "runs" / "trial", steps=40, games=9, flags={"total_timesteps": 40}, **trial)
    flags = ["--out", tmp_path / "out", "--resamples", "50"]
    status, output, _ = run_command(monkeypatch, capsys, tmp_path / "runs", *flags)
    assert status == 0 and "games that ended in 50 agent steps" in output
    assert "Left out, as" in output


def test_an_iteration_of_whole_rollouts(tmp_path):
    """Of 1,000 steps games side by side play 960: twenty iterations, and no tail."""
    folder = write_run(tmp_path / "run", steps=960, flags={"num_envs": 8, "num_steps": 40})
    folder = runs.read_folder(folder, None)
    steps = scores.iteration_steps([(scores.describe(folder), folder)], ["agent"])
    assert steps == 48
    run = scores.run_of(folder, steps, False)
    assert (run.frames[-1], run.tail) == (4 * 960, 0)


def test_compare_looks_at_two_settings_alone(tmp_path, monkeypatch, capsys, refused):
    """A third that has fewer seeds, games and steps takes nothing from them."""
    for agent in ("dqn", "qrdqn"):
        for seed in range(1, 6):
            for game in ("Pong", "Qbert"):
                write_run(tmp_path / f"{agent}{seed}{game}", agent, f"ALE/{game}-v5", seed)
    write_run(tmp_path / "iqn", "iqn", steps=500, flags={"total_timesteps": 500})
    words = ["--runs", tmp_path, "--resamples", "50"]
    status, output, _ = run_command(monkeypatch, capsys, "compare", "dqn", "qrdqn", *words)
    assert status == 0
    assert "(2 games, 5 seeds, 4,000 frames)" in output
    assert "50 agent steps" in output and "iqn" not in output
    relative = ["--normalize", "baseline:iqn"]
    _, output, _ = run_command(monkeypatch, capsys, "compare", "dqn", "qrdqn", *words, *relative)
    assert "score relative to iqn, batch size 32 (1 game, 1-5 seeds, 2,000 frames)" in output
    assert "'sac' names 0 settings: give one of dqn" in refused("compare", "dqn", "sac", *words)
    assert "no run has 'colour', by which to group" in refused("compare", "dqn", "qrdqn", *words, "--by", "colour")


@pytest.mark.parametrize(("value", "step"), [(np.nan, 5), (np.inf, 5), (1.0, 0)])
def test_a_return_that_is_no_number_is_named(tmp_path, value, step):
    folder = write_run(tmp_path / "run")
    writer = SummaryWriter(str(folder))
    writer.add_scalar("charts/episodic_return", value, step)
    writer.close()
    with pytest.raises(BadInput, match=rf"{folder}: charts/episodic_return is .* at step {step}"):
        runs.read_folder(folder, None)


def test_linked_folders_are_read(tmp_path):
    write_run(tmp_path / "elsewhere" / "a")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    assert [path.name for path in runs.find_folders([tmp_path / "runs"])] == ["linked"]


def test_hours_do_not_count_pauses(tmp_path, monkeypatch):
    """Half an hour, a day's pause, half an hour."""
    folder = write_run(tmp_path / "run")
    log_of(folder).unlink()
    for number, (began, step, purge) in enumerate([(0.0, 500, None), (90_000.0, 1_000, 501)]):
        writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=str(number))
        writer.add_scalar("charts/episodic_return", 1.0, step, walltime=began + 1_800)
        writer.close()
        log = max(folder.glob("events*"), key=lambda path: path.name[-1])
        data = bytearray(log.read_bytes())
        data[13:21] = np.float64(began).tobytes()
        log.write_bytes(bytes(data))
    monkeypatch.setattr(runs, "_check", lambda *args: None)  # the header's time was changed by hand
    times = runs.read_folder(folder, None).series["charts/episodic_return"].times
    assert times.tolist() == pytest.approx([1_800, 3_600], abs=5)


def test_gains_are_relative_to_those_on_random_play(tmp_path):
    text = rows("A", "Pong", [1], [100], lambda s, f: -10.7) + rows("B", "Pong", [1], [100], lambda s, f: -15.7)
    text += rows("A", "Qbert", [1], [100], lambda s, f: 163.9) + rows("B", "Qbert", [1], [100], lambda s, f: 163.9)
    found = study(tmp_path, text)
    gains = results.per_game_gains(*found.groups, found.games)
    assert gains == {"Pong": pytest.approx(100.0), "Qbert": 0.0}  # (-10.7 + 15.7) / (-15.7 + 20.7)


# ---- fewer than five runs
def compared(tmp_path, monkeypatch, capsys, text):
    """What compare prints of A and B of a table."""
    path = table_of(tmp_path, HEADER + text)
    flags = ["--scores", path, "--resamples", "500"]
    status, output, error = run_command(monkeypatch, capsys, "compare", "A", "B", *flags)
    assert (status, error) == (0, "")
    return output


def two_settings(first, second, game="Pong"):
    """Every run of A, of which there are `first`, is above every run of B, of which there are `second`."""
    text = rows("A", game, range(first), [100], lambda s, f: 10 + s / 10)
    return text + rows("B", game, range(second), [100], lambda s, f: s / 10)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (4, 9), (9, 4)])
def test_compare_cannot_tell_from_fewer_than_five_runs(tmp_path, monkeypatch, capsys, first, second):
    output = compared(tmp_path, monkeypatch, capsys, two_settings(first, second))
    counts = f"{first} of A and {second} of B in the game that has fewest; it takes at least 5 of each"
    assert f"probability 1.00 [1.00, 1.00] †: there are too few runs to tell ({counts})." in output
    assert "noise" not in output and "better" not in output
    marked = {line[16:17] for line in output.splitlines() if line.endswith("] †")}
    assert marked == {name for name, count in (("A", first), ("B", second)) if count < 5}


def test_compare_tells_from_five_runs(tmp_path, monkeypatch, capsys):
    output = compared(tmp_path, monkeypatch, capsys, two_settings(5, 5))
    assert "probability 1.00 [1.00, 1.00]: the first is better, beyond the noise of the seeds." in output
    assert "†" not in output and "too few" not in output


def test_runs_are_counted_in_the_game_that_has_fewest(tmp_path, monkeypatch, capsys):
    """A resample draws within each game: runs of another game don't help. Games without a score don't count."""
    text = two_settings(9, 9) + two_settings(4, 9, "Breakout")
    assert "too few runs to tell (4 of A and 9 of B" in compared(tmp_path, monkeypatch, capsys, text)
    text = two_settings(5, 5) + two_settings(1, 1, "AirRaid")
    assert "beyond the noise" in compared(tmp_path, monkeypatch, capsys, text)


def unequal_runs(tmp_path, small, large):
    """Results of batch size 8, in `small` runs of each game, and 32, in `large`; two games, two points in time."""
    text = ""
    for size, count in ((8, small), (32, large)):
        for game in ("Pong", "Breakout"):
            text += rows("A", game, range(count), [100, 200], lambda s, f: s + f / 100, batch_size=size)
    found = study(tmp_path, text, ["agent", "batch_size"], header="agent,game,seed,frames,score,batch_size\n")
    return results.compute(found, None, 100, np.random.default_rng(0))


def test_tables_mark_intervals_of_too_few_runs(tmp_path):
    made = unequal_runs(tmp_path, 4, 5)
    tables = {table.name: table for table in results.tables(made)}
    for name in ("aggregates", "curves", "improvement"):
        table = tables[name]
        place = table.columns.index("fewest runs")
        assert table.columns[place - 1 : place + 2] == ["high", "fewest runs", "too few"]
        marks = {row[0]: row[place : place + 2] for row in table.rows}
        assert marks.pop("A, batch size 8") == [4, "†"]
        assert marks in ({}, {"A, batch size 32": [5, ""]})
        report.write_csv(table, tmp_path / "table.csv")
        assert ",4,†" in (tmp_path / "table.csv").read_text()
    note = "Warning: too few runs to tell from the intervals marked †, which rest on fewer than 5 runs in a game: "
    assert made.study.notes[-1] == note + "A, batch size 8 (4)."
    page = report.page(made, list(tables.values()), [], "command")
    assert html.escape(note) in page and "<td class=text>†</td>" in page
    text = report.markdown(made, list(tables.values()), "command")
    assert note in text and " | 4 | † |" in text and " | 5 |  |" in text
    made = unequal_runs(tmp_path, 5, 5)
    assert not made.study.notes and "†" not in report.markdown(made, results.tables(made), "command")


def test_figures_mark_intervals_of_too_few_runs(tmp_path):
    """A dagger at the setting or the interval, which is hatched, and what it means in the caption."""
    drawn = {name: figure for name, _, figure in figures.draw(unequal_runs(tmp_path, 4, 5))}
    for name in ("curves", "intervals", "profiles", "sweep_batch_size"):
        texts = [text.get_text() for text in drawn[name].findobj(matplotlib.text.Text)]
        assert sum("†: fewer than 5 in a game" in text.replace("\n", " ") for text in texts) == 1, name
        marked = [text for text in texts if text.endswith(" †")]
        assert set(marked) == ({" †"} if name == "sweep_batch_size" else {"A, batch size 8 †"}), name
    bars = [bar for axes in drawn["intervals"].axes for bar in axes.patches]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True] * 4  # the reference, batch size 32, comes first
    for name in ("curves", "profiles"):
        bands = drawn[name].axes[0].collections
        assert [bool(band.get_hatch()) for band in bands] == [True, False]  # and is drawn last
    (gains,) = [figure for name, figure in drawn.items() if name.startswith("gains")]
    assert gains.axes[0].get_title().endswith(" †")
    for name, _, figure in figures.draw(unequal_runs(tmp_path, 5, 5)):
        assert not [text for text in figure.findobj(matplotlib.text.Text) if "†" in text.get_text()], name


def test_a_long_title_of_gains_is_on_its_figure(tmp_path):
    names = [f"qrdqn of ours with a target network frequency of {steps}" for steps in (1000, 8000)]
    text = "".join(rows(name, "Pong", [1], [100], lambda s, f: 1) for name in names)
    found = results.compute(study(tmp_path, text), None, 50, np.random.default_rng(0))
    with matplotlib.rc_context(figures.STYLE):
        drawn = figures.gains(found, found.others[0])
        drawn.canvas.draw()
        place = drawn.axes[0].title.get_window_extent()
    assert place.x0 >= 0 and place.x1 <= drawn.get_figwidth() * drawn.dpi


# ---- the whole
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two agents, two batch sizes, three games, two seeds."""
    root = tmp_path_factory.mktemp("runs")
    for agent in ("dqn", "qrdqn"):
        for size in (8, 32):
            for place, game in enumerate(("Pong", "Breakout", "Qbert")):
                for seed in (1, 2):
                    level = {"dqn": 1.0, "qrdqn": 3.0}[agent] + size / 100 + 100 * place
                    name = f"{game}-{agent}-{size}-{seed}"
                    write_run(root / name, agent, f"ALE/{game}-v5", seed, level=level, flags={"batch_size": size})
    return root


def table_in(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reported(folders, tmp_path_factory):
    """The folder that a user makes of them."""
    out = tmp_path_factory.mktemp("reported") / "results"
    arguments = [sys.executable, "-m", "analysis", str(folders), "--out", str(out), "--resamples", "500"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(out / "report.html") in done.stdout
    return out


def test_the_report(reported):
    out = reported
    pictures = {"curves", "intervals", "profiles", "games", "time", "sweep_batch_size", "diagnostics"}
    pictures |= {"gains_1_dqn__batch_size_8", "gains_2_qrdqn__batch_size_8", "gains_3_qrdqn__batch_size_32"}
    tables = {"aggregates", "improvement", "games", "curves", "scores"}
    expected = {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")} | {f"{name}.csv" for name in tables}
    assert {path.name for path in out.iterdir()} == expected | {"report.html", "report.md", "analysis.json", "cache"}
    assert list(out.parent.iterdir()) == [out]  # nothing is left beside it
    assert (out / "report.html").stat().st_size > 100_000
    for name in pictures:
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (out / f"{name}.svg").read_bytes()
    found = {(row["setting"], row["metric"]): row for row in table_in(out / "aggregates.csv")}
    assert len(found) == 16
    for row in found.values():
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    ours = [row for row in table_in(out / "scores.csv") if row["setting"] == "qrdqn, batch size 8"]
    last = [float(row["normalised"]) for row in ours if row["frames"] == "4000"]
    assert len(last) == 6
    middle = np.mean(sorted(last)[1:5])
    assert float(found["qrdqn, batch size 8", "IQM"]["value"]) == pytest.approx(middle, rel=1e-9)


def test_the_same_seed_gives_the_same_files(reported, folders, tmp_path, monkeypatch, capsys):
    """Another process made the first ones. The folder is this program's own: it is replaced if there are runs."""
    out = tmp_path / "results"
    shutil.copytree(reported, out)
    status, _, error = run_command(monkeypatch, capsys, folders, "--out", out, "--only", "agent=nobody")
    assert status == 2 and "no run has agent nobody" in error
    assert (out / "report.html").read_bytes() == (reported / "report.html").read_bytes()
    assert run_command(monkeypatch, capsys, folders, "--out", out, "--resamples", "500")[0] == 0
    assert (out / "report.html").read_bytes() != (reported / "report.html").read_bytes()  # it names the command
    names = {path.name for path in reported.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in sorted(names):
        if name.endswith((".csv", ".svg", ".png")):
            assert (out / name).read_bytes() == (reported / name).read_bytes(), name


def test_no_figure_shows_markup(tmp_path):
    """Names may have dollars, so that mathtext is off: ticks of logarithmic axes must do without it."""
    found = []
    for level, flags in ((0.0, {"batch_size": 8}), (1.0, {"batch_size": 32})):
        for number, game in enumerate(("Pong", "Breakout")):
            folder = tmp_path / f"{game}{level}"
            write_run(folder, "a$b$", f"ALE/{game}-v5", 1, level=level * 1_000**number, flags=flags)
            found.append(scores.run_of(runs.read_folder(folder, None), 100, False))
    made = scores.make_study(found, ["agent", "batch_size"], "none")
    made = results.compute(made, None, 50, np.random.default_rng(0))
    made.gains["a$b$, batch size 8"] = {"Pong": 2.0, "Breakout": -9_000.0}
    scales = set()
    for name, _, figure in figures.draw(made):
        figure.savefig(tmp_path / "figure.png")
        texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
        assert not [text for text in texts if "mathdefault" in text], name
        scales |= {axes.get_yscale() for axes in figure.axes}
    assert scales == {"linear", "log", "symlog"}


def test_runs_that_end_before_their_first_report(tmp_path):
    """Diagnostics, but none as early as the frames that all runs have: empty panels, and no error."""
    found = [runs.read_folder(write_run(tmp_path / str(seed), seed=seed), None) for seed in (1, 2)]
    found = [scores.run_of(folder, 50, False) for folder in found]
    found[0].frames, found[0].scores, found[0].hours = found[0].frames[:1], found[0].scores[:1], found[0].hours[:1]
    found[1].settings = found[1].settings | {"batch_size": 8}
    made = results.compute(scores.make_study(found, ["batch_size"], "none"), None, 50, np.random.default_rng(0))
    figure = figures.diagnostics(made)
    figure.savefig(tmp_path / "figure.png")
    assert {axes.get_yscale() for axes in figure.axes} == {"linear"}


def test_runs_without_a_replay(on_policy):
    """Grouped by the shape of their roll-outs where it varies; a column for each of their diagnostics."""
    found = []
    for num_envs, seed in ((1, 1), (1, 2), (3, 1), (3, 2)):
        flags = {"num_envs": num_envs, "num_steps": 24 // num_envs, "seed": seed, "diagnostics_frequency": 24}
        folder = on_policy.train(make_args(on_policy, total_timesteps=720, **flags))
        found.append(scores.run_of(runs.read_folder(folder, None), 240, False))
    by = command.default_grouping(found, from_tables=False)
    assert by == ["agent", "num_envs", "num_steps"]
    assert command.default_grouping(found[:2], from_tables=False) == ["agent"]
    made = results.compute(scores.make_study(found, by, "none"), None, 50, np.random.default_rng(0))
    titles = [axes.get_title() for axes in figures.diagnostics(made).axes]
    assert titles[:4] == ["return", "srank", "dormant neurons (share)", "feature rank"]
    assert ("effective sample size" in titles) == (name_of(on_policy) == "ppo")
    assert "variance of the loss" not in titles


def test_a_folder_of_others_is_not_overwritten(no_figures, folders, tmp_path, monkeypatch, capsys, refused):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        assert "--out" in refused(folders, "--out", out)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    out = tmp_path / "results"
    flags = ["--out", out, "--resamples", "50"]
    assert run_command(monkeypatch, capsys, folders, *flags)[0] == 0
    (out / "notes.txt").write_text("what it means")
    assert "notes.txt, which is not of this analysis" in refused(folders, *flags)
    (out / "notes.txt").unlink()
    shutil.copytree(folders, out / "cache" / "runs")
    assert "is in the folder of --out" in refused(out / "cache" / "runs", *flags)
    assert (out / "cache" / "runs").exists() and (out / "report.html").exists()
    shutil.rmtree(out / "cache" / "runs")
    assert f"is in {out}, the folder of another analysis" in refused(folders, "--out", out / "by_seed")
    assert run_command(monkeypatch, capsys, folders, *flags)[0] == 0


def test_choosing(no_figures, folders, tmp_path, monkeypatch, capsys, refused):
    choice = ["--only", "agent=dqn", "batch_size=8,32", "--games", "Pong", "ALE/Qbert-v5", "--resamples", "100"]
    assert run_command(monkeypatch, capsys, folders, "--out", tmp_path / "out", *choice)[0] == 0
    table = table_in(tmp_path / "out" / "games.csv")
    for spelt in ("agent,batch-size", "--agent, --batch-size"):  # as the warnings have them, too
        words = ["compare", "dqn, batch size 8", "dqn, batch size 32", "--runs", folders, f"--by={spelt}"]
        assert run_command(monkeypatch, capsys, *words, "--resamples", "100")[0] == 0
    assert {row["game"] for row in table} == {"Pong", "Qbert"}
    assert {row["setting"] for row in table} == {"dqn, batch size 8", "dqn, batch size 32"}
    for wrong, words in (
        (["--games", "Pnog"], "--games Pnog: there are runs of Breakout, Pong, Qbert"),
        (["--only", "colour=red"], "no run has 'colour'"),
        (["--by", "colour"], "no run has 'colour'"),
        (["--reference", "iqn"], "'iqn' names 0 settings"),
        (["--reference", "dqn"], "'dqn' names 2 settings"),
        (["--resamples", "0"], "--resamples"),
        (["--only", "agent=dqn,typo"], "no run has agent typo; there are dqn, qrdqn"),
        (["--only", "batch_size=8", "runs/"], "--only runs/: it takes batch_size=8 or the like; folders with runs"),
        (["--reference", "dqn, n step 3"], "or group otherwise with --by"),
    ):
        assert words in refused(folders, "--out", tmp_path / "new", *wrong)


def test_runs_without_a_value_can_be_chosen(no_figures, tmp_path, monkeypatch, capsys):
    """A flag that is None, as the report calls it."""
    for number, target_kl in enumerate((None, 0.02, 0.05)):
        write_run(tmp_path / "runs" / str(number), flags={"target_kl": target_kl})
    flags = ["--by", "target_kl", "--only", "target_kl=None,0.02", "--resamples", "50"]
    assert run_command(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "out", *flags)[0] == 0
    labels = {row["setting"] for row in table_in(tmp_path / "out" / "aggregates.csv")}
    assert labels == {"target kl None", "target kl 0.02"}


def test_runs_without_an_evaluation(no_figures, tmp_path, refused):
    write_run(tmp_path / "run", steps=40, games=9)
    words = refused(tmp_path / "run", "--out", tmp_path / "out", "--iteration", "50")
    assert "no run has a score yet" in words


def test_a_log_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runs.Path, "read_bytes", refuse)
    with pytest.raises(BadInput, match=r"tfevents\..* could not be read: Permission denied\."):
        runs.read_folder(folder, None)


def test_compare(folders, monkeypatch, capsys, refused):
    pair = ["qrdqn, batch size 8", "dqn, batch size 8"]
    flags = ["--runs", folders, "--resamples", "500"]
    status, output, _ = run_command(monkeypatch, capsys, "compare", *pair, *flags)
    assert status == 0
    assert "qrdqn, batch size 8 won 3: " in output and "lost" not in output
    assert "too few runs to tell (2 of qrdqn, batch size 8 and 2 of dqn, batch size 8 in" in output
    assert output.count("IQM") == 1 and output.count("[") == 9
    status, output, _ = run_command(monkeypatch, capsys, "compare", *reversed(pair), *flags)
    assert status == 0 and "lost 3: " in output
    for wrong in (["dqn", "qrdqn"], ["dqn, batch size 8", "dqn, batch size 8"]):
        refused("compare", *wrong, *flags)


PROBE = """
<script>
window.addEventListener("load", () => {
  const found = {errors: window.errors, sorts: [], images: [...document.images].map(x => x.naturalWidth > 100)};
  found.outside = [...document.querySelectorAll("[src], [href]")].filter(x => !x.src.startsWith("data:"));
  for (const head of document.querySelectorAll("th")) {
    const cells = () => [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex]);
    const sorted = () => {
      head.click();
      return [head.getAttribute("aria-sort"), cells().map(cell => cell.dataset.value ?? cell.textContent)];
    };
    found.sorts.push([sorted(), sorted()]);
  }
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify(found);
  document.body.append(answer);
});
</script>
"""
CATCH = "<script>window.errors = []; window.onerror = message => window.errors.push(message);</script>"
BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_page_in_a_browser(reported, tmp_path):
    """No script fails, nothing is fetched, every picture shows, and every column of every table sorts both ways."""
    page = (reported / "report.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("<meta", CATCH + "<meta", 1).replace("</html>", PROBE + "</html>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    command = [BROWSER, *flags, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    answer = done.stdout.partition('<pre id="answer">')[2].partition("</pre>")[0]
    found = json.loads(html.unescape(answer))
    assert found["errors"] == [] and found["outside"] == []
    assert len(found["images"]) == 10 and all(found["images"])
    assert len(found["sorts"]) > 20
    for (mark, up), (then, down) in found["sorts"]:
        assert (mark, then) == ("ascending", "descending")
        known = [value for value in up if value != ""]  # what is not known comes last
        assert up == known + [""] * (len(up) - len(known))
        assert sorted(up) == sorted(down)
        with contextlib.suppress(ValueError):
            numbers = [float(value) for value in known]
            assert numbers == sorted(numbers)
            assert [float(value) for value in down if value != ""] == numbers[::-1]
