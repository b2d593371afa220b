"""What a user meets: --help, the progress bar, one sentence for every wrong flag, and commands in the documents."""

import fcntl
import json
import math
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from dataclasses import fields

import numpy as np
import pytest
import tyro
from conftest import AGENTS, ROOT, load, make_args

each_agent = pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)


def help_texts(path):
    """{flag: help text} of an agent, as its source has them."""
    return dict(re.findall(r"^    (\w+): .+ = .+?  # (.+)$", path.read_text(), re.MULTILINE))


def make(module, **flags):
    """The agent's flags, as the command line makes them."""
    if "dataset_dir" in [field.name for field in fields(module.Args)]:
        flags = {"dataset_dir": "dataset"} | flags
    return module.Args(**flags)


# ---- wrong flags
MAY_BE_ZERO = ["seed", "noop_max", "exploration_steps"]  # and those whose help says what 0 means
NO_SHARES = [
    "v_min",
    "v_max",
    "target_noise_std",
    "spr_weight",
    "cql_alpha",
    "dr3_coefficient",
    "vf_coef",
    "max_grad_norm",
]


@each_agent
def test_numbers_out_of_range_are_refused(path, refused):
    """One rule: counts from 1, or 0 where that means none, shares from 0 to 1; nothing is NaN, infinite or huge."""
    module = load(path)
    texts = help_texts(path)
    tried = 0
    for field in fields(module.Args):
        wrong = []
        if field.type in (int, int | None):
            wrong = [-1, 2**31, 10**30]
            if field.name in MAY_BE_ZERO or "(0: " in texts[field.name]:
                make(module, **{field.name: 0})
            else:
                wrong.append(0)
        elif field.type in (float, float | None):
            wrong = [math.nan, math.inf, -math.inf, -1e7, 1e7]
            if field.name not in NO_SHARES:
                wrong += [-0.01, 1.01]
        for value in wrong:
            error = refused(make, module, **{field.name: value})
            assert error.startswith(f"error: --{field.name.replace('_', '-')} is {value}: it must be from ")
            tried += 1
    assert tried > 90


def test_a_return_must_fit_into_the_ring_the_games_and_the_steps_before_learning(agent, refused):
    n_step = 10
    least = {"buffer_size": 2 * (n_step + 6), "max_episode_steps": n_step, "learning_starts": n_step}
    make(agent, n_step=n_step, **least)
    for name in least:
        error = refused(make, agent, n_step=n_step, **{name: least[name] - 1})
        assert f"n-step is {n_step}" in error
        assert f"--{name.replace('_', '-')}" in error
        assert f"allow {n_step - 1}." in error


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("qrdqn", {"batch_divisor": 5}, "--batch-divisor is 5: it must divide --batch-size, 32"),
        ("rainbow", {"v_min": 5.0}, "--v-min is 5.0: it must be from -1000000.0 to 0"),
        ("rainbow", {"v_max": 0.0}, "--v-max is 0.0"),
        ("rainbow", {"n_atoms": 1}, "--n-atoms is 1: it must be from 2"),
        ("drq_eps", {"image_pad": 43}, "--image-pad is 43: it must be from 0 to 42"),
        ("spr", {"n_step": 4}, "--spr-steps is 5: it must be at most --n-step, 4"),
        ("cql_offline", {"dataset_dir": None}, "--dataset-dir is missing"),
        ("cql_offline", {"train_frequency": 3}, "--train-frequency is 3: it must divide"),
        ("cql_offline", {"data_fraction": 0.0}, "--data-fraction is 0.0"),
        ("cql_offline", {"n_atoms": 1}, "--n-atoms is 1: it must be from 2"),
    ],
)
def test_wrong_settings_of_one_agent(name, flags, words, refused):
    assert words in refused(make, load(ROOT / "agents" / f"{name}.py"), **flags)


@each_agent
def test_track_needs_wandb(path, monkeypatch, refused):
    module = load(path)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "--track needs wandb: pip install wandb" in refused(make, module, track=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag", "3"], "--no-such-flag"),
        (["--seed", "1.5"], "--seed"),
        (["--network", "resnet"], "--network"),
    ],
)
def test_words_that_are_no_flags_or_values(dqn, flags, words, capsys):
    """tyro's own answers, which are longer than a line."""
    with pytest.raises(SystemExit) as exit_:
        tyro.cli(dqn.Args, args=flags)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


# ---- the whole program
MAIN = """
import json, runpy, sys
for line in sys.stdin:
    sys.argv = ["dqn.py", "--no-cuda", "--total-timesteps", "20", "--eval-episodes", "0", *json.loads(line)]
    try:
        runpy.run_path("dqn.py", run_name="__main__")
    except SystemExit as exit_:
        print(exit_.code, "minatar" in sys.modules)
"""
NO_GAME = "it must be ALE/<Game>-v5 or MinAtar/<Game>-v1"
WRONG = [
    (["--batch-size", "0"], "--batch-size is 0: it must be from 1 to 2147483647"),
    (["--buffer-size", "2000000000", "--total-timesteps", "2000000000"], "GB are free: lower --buffer-size"),
    (["--resume", "nowhere"], "nowhere"),
    (["--env-id", "CartPole-v1"], f"--env-id is CartPole-v1: {NO_GAME}"),
    (["--env-id", "PongNoFrameskip-v4"], f"--env-id is PongNoFrameskip-v4: {NO_GAME}"),
    (["--env-id", "ALE/Pong-v4"], "ALE/Pong-v4"),
    (["--env-id", "ALE/Po:ng-v5"], "ALE/Po:ng-v5"),
    (["--env-id", "ALE/Pogn-v5"], "Did you mean: `Pong`?"),
    (["--env-id", "MinAtar/Breakout-v0"], "MinAtar/Breakout-v0"),  # all actions, also those without effect
    (["--env-id", "MinAtar/Asterisk-v1"], "Did you mean: `Asterix`?"),
]


def test_a_wrong_flag_is_one_line_and_leaves_nothing(tmp_path):
    """On stderr, with exit status 2, before a run folder; and only the last of these needs MinAtar's package."""
    shutil.copy(ROOT / "agents" / "dqn.py", tmp_path)
    lines = "\n".join(json.dumps(flags) for flags, _ in WRONG)
    done = subprocess.run([sys.executable, "-c", MAIN], input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for error, (_, words) in zip(done.stderr.splitlines(), WRONG, strict=True):
        assert error.startswith("error: ")
        assert words in error
    assert done.stdout.splitlines() == ["2 False"] * (len(WRONG) - 1) + ["2 True"]
    assert os.listdir() == ["dqn.py"]


def test_a_game_that_is_not_installed(dqn, monkeypatch, refused):
    monkeypatch.setattr(dqn.ale_py.roms, "get_rom_path", lambda name: None)
    assert "--env-id is ALE/Breakout-v5: " in refused(dqn.train, make_args(dqn, env_id="ALE/Breakout-v5"))


def test_a_game_without_a_cap_starts(dqn):
    """ALE counts frames in 32 bits: more agent steps than that must not overflow."""
    envs = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5", max_episode_steps=2**31 - 1))
    dqn.reset(envs, 1, dqn.TRAINING, 0)
    _, _, terminations, truncations, _ = envs.step(np.array([0]))
    assert not terminations[0]
    assert not truncations[0]


@each_agent
def test_help_says_what_each_flag_means(path, monkeypatch, capsys):
    module = load(path)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        tyro.cli(module.Args, args=["--help"], description=module.__doc__)
    assert exit_.value.code == 0
    shown = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    assert module.__doc__.split("\n")[0] in shown
    texts = help_texts(path)
    assert len(texts) == len(fields(module.Args)) > 25
    for name, text in texts.items():
        flag = name.replace("_", "-")
        assert re.search(rf"--{flag}\b.{{0,60}}? {re.escape(text)} \(default: ", shown), name
        if name.endswith(("_steps", "_frequency", "_starts", "_timesteps")):
            assert "agent steps" in text  # the unit


# ---- progress
def test_plain_lines_where_the_output_is_no_terminal(dqn, capsys, monkeypatch):
    """One a minute; here every 20 ms."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    bar = dqn.make_bar(make_args(dqn), 50)
    assert (bar.mininterval, bar.maxinterval) == (60, 60)
    bar.mininterval = 0.02
    bar.set_postfix_str("return 1.0, epsilon 0.500", refresh=False)
    for _ in range(250):
        time.sleep(0.001)
        bar.update()
    dqn.tqdm.write("step 300: mean return 2.00 of [2.0]")
    bar.close()
    output = capsys.readouterr()
    assert output.err == ""
    assert "\r" not in output.out
    first, *others, note, last = output.out.splitlines()
    assert first == "17% 50/300 [00:00<?, ? steps/s]"
    assert len(others) > 3
    for line in [*others, last]:
        assert re.fullmatch(r"\d+% \d+/300 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ steps/s, return 1.0, epsilon 0.500\]", line)
    assert note == "step 300: mean return 2.00 of [2.0]"
    assert last.startswith("100% 300/300 ")


def test_a_bar_in_a_terminal(dqn, monkeypatch, capsys):
    """With the speed, the time left, the last return and epsilon."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # 24 rows of 120 columns
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        dqn.train(make_args(dqn, total_timesteps=2_000, learning_starts=1_900, eval_episodes=1))
        monkeypatch.undo()
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # Linux's end of a terminal
        pass
    os.close(master)
    text = shown.decode()
    assert text.count("\r") >= 2
    assert re.search(r"2000/2000 \[\d\d:\d\d<00:00, +[\d.]+ steps/s, return [\d.]+, epsilon [\d.]+\]", text)
    output = capsys.readouterr()
    assert output.err == ""
    assert re.fullmatch(r"run folder: .+ \(cpu\)\nstep 2,000: mean return .+\n", output.out)  # no plain lines


# ---- the documents
FOLDERS = [ROOT, *[ROOT / name for name in ("agents", "analysis", "benchmarks", "experiments")]]
SCRIPTS = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def flags_of(path):
    """The flags of a script that tyro makes from a dataclass."""
    names = re.findall(r"^    (\w+): .+ = .+$", path.read_text(), re.MULTILINE)
    flags = {f"--{name.replace('_', '-')}" for name in names}
    return flags | {flag.replace("--", "--no-", 1) for flag in flags} | {"--help"}


def commands_in(text):
    """[(script, words)] of every command line; it goes on after a backslash, in a docstring by its indentation."""
    found = []
    for script, rest in re.findall(r"(?:python|uv run) (-m analysis|\S+\.py)((?:[^\n`\\]|\\\n|\n {8,})*)", text):
        name = "analysis/__main__.py" if script == "-m analysis" else script
        own = re.split(r" (?:&&|\||;|>) ", rest.replace("\\\n", " "))[0]
        own = re.sub(r"\$\w+", "1", own)  # a loop's variable
        found.append((name, shlex.split(own, comments=True)))
    return found


def find(name):
    """The script of this name; an agent's may come without its folder."""
    paths = [path for path in (ROOT / name, ROOT / "agents" / name) if path.exists()]
    assert len(paths) == 1, name
    return paths[0]


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_the_documents_works(path):
    """Its script exists and has its flags; an agent takes their values. So do those in docstrings."""
    text = path.read_text()
    if path.suffix == ".py":
        text = text.partition('"""')[2].partition('"""')[0]
    commands = commands_in(text)
    assert len(commands) >= 2 or path not in [*AGENTS, ROOT / "README.md"]
    for name, words in commands:
        script = find(name)
        flags = {word.rstrip(".,;") for word in words if word.startswith("--")}
        assert flags <= flags_of(script), name
        if script in AGENTS and "--help" not in words:
            tyro.cli(load(script).Args, args=words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_and_script_that_a_page_names_exists(page):
    text = page.read_text()
    for name in set(re.findall(r"\b[\w/]+\.py\b", text)) - {"agents/mydqn.py"}:  # a reader's own
        find(name)
    known = set().union(*[flags_of(path) for path in SCRIPTS])
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for span in re.findall(r"`(--[^`]+)`", prose):
        assert set(re.findall(r"--[a-z][\w-]*", span)) <= known, span
