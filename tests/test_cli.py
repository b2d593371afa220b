"""What a user meets: --help, the progress bar, and one sentence for every wrong input."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from conftest import AGENTS, ROOT, load


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(agent, monkeypatch, capsys, tmp_path, *flags):
    """Run the agent with these flags in this process; return the one sentence with which it refuses them."""
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{agent.AGENT}.py", "--no-cuda", *flags])
    with pytest.raises(SystemExit) as exit_:
        agent.train(agent.parse_args())
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"
    return error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "ALE/Pnog-v5"], ["'ALE/Pnog-v5'", "ALE/Pong-v5"]),
        (["--env-id", "breakout"], ["ALE/Breakout-v5", "MinAtar/Breakout-v1"]),
        (["--env-id", "PongNoFrameskip-v4"], ["ALE/Pong-v5"]),
        (["--env-id", "MinAtar/Asterisk-v1"], ["MinAtar/Asterix-v1"]),
        (["--env-id", "MinAtar/Breakout-v0"], ["'MinAtar/Breakout-v0'", "MinAtar/Breakout-v1"]),  # v0: all actions
        (["--env-id", "Pendulum-v1"], ["'Pendulum-v1'", "discrete actions"]),
        (["--env-id", "HalfCheetah-v5"], ["'HalfCheetah-v5'", "discrete"]),
        (["--env-id", ""], ["''"]),
        (["--buffer-size", "2000000000", "--total-timesteps", "2000000000"], ["GB", "free", "--buffer-size"]),
        (["--buffer-size", "5"], ["--buffer-size", "--n-step"]),
        (["--n-step", "0"], ["--n-step is 0", "from 1 to"]),
        (["--n-step", "30000", "--learning-starts", "40000"], ["--n-step 30000"]),
        (["--batch-size", "0"], ["--batch-size is 0", "from 1 to"]),
        (["--batch-size", "-8"], ["--batch-size is -8"]),
        (["--learning-rate", "nan"], ["--learning-rate is nan", "from 0 to 1"]),
        (["--end-e", "1.5"], ["--end-e is 1.5"]),
        (["--seed", "-1"], ["--seed is -1"]),
        (["--seed", "18446744073709551616"], ["--seed is 18446744073709551616"]),
        (["--noop-max", "3000000000"], ["--noop-max is 3000000000"]),
        (["--eval-only"], ["--checkpoint"]),
        (["--checkpoint", "model.pt"], ["--eval-only"]),
        (["--capture-video", "--eval-episodes", "0"], ["--capture-video", "--eval-episodes"]),
        (["--eval-only", "--checkpoint", "model.pt", "--eval-episodes", "0"], ["--eval-only", "--eval-episodes"]),
        (["--eval-only", "--checkpoint", "missing.pt"], ["missing.pt", "No such file"]),
    ],
)
def test_wrong_input_is_one_sentence(agent, monkeypatch, capsys, tmp_path, flags, words):
    error = refused(agent, monkeypatch, capsys, tmp_path, *flags)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("qrdqn", ["--batch-divisor", "5"], ["--batch-divisor 5 does not divide --batch-size 32"]),
        ("qrdqn", ["--batch-divisor", "64"], ["--batch-divisor 64 does not divide --batch-size 32"]),
        ("qrdqn", ["--batch-divisor", "0"], ["--batch-divisor is 0"]),
        ("qrdqn", ["--target-noise-std", "-1"], ["--target-noise-std is -1"]),
        ("rainbow", ["--v-min", "5"], ["--v-min is 5"]),
        ("rainbow", ["--v-max", "0"], ["--v-max is 0"]),
        ("rainbow", ["--v-max", "inf"], ["--v-max is inf"]),
        ("rainbow", ["--n-atoms", "1"], ["--n-atoms is 1"]),
        ("iqn", ["--n-policy-tau", "0"], ["--n-policy-tau is 0"]),
        ("der", ["--n-atoms", "1"], ["--n-atoms is 1"]),
        ("drq_eps", ["--image-pad", "-1"], ["--image-pad is -1"]),
        ("drq_eps", ["--intensity", "nan"], ["--intensity is nan"]),
        ("spr", ["--spr-weight", "-5"], ["--spr-weight is -5"]),
        ("spr", ["--updates-per-step", "0"], ["--updates-per-step is 0"]),
        ("spr", ["--n-step", "4"], ["--spr-steps 5", "--n-step 4"]),
    ],
)
def test_wrong_settings_of_one_agent(name, flags, words, monkeypatch, capsys, tmp_path):
    error = refused(load(ROOT / "agents" / f"{name}.py"), monkeypatch, capsys, tmp_path, *flags)
    for word in words:
        assert word in error


def test_a_game_that_is_not_installed(agent, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(agent.ale_py.roms, "get_rom_path", lambda name: None)
    error = refused(agent, monkeypatch, capsys, tmp_path, "--env-id", "ALE/Breakout-v5", "--buffer-size", "1000")
    assert "ALE/Breakout-v5" in error and "not installed" in error


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("wandb", ["--track"]),
        ("minatar", ["--env-id", "MinAtar/Breakout-v1"]),
        ("imageio_ffmpeg", ["--capture-video"]),
    ],
)
def test_a_package_that_is_not_installed(agent, monkeypatch, capsys, tmp_path, package, flags):
    find = agent.importlib.util.find_spec
    monkeypatch.setattr(agent.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert f"pip install {package}" in refused(agent, monkeypatch, capsys, tmp_path, *flags)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        ({"agent": "c51", "args": {}, "global_step": 1, "weights": {}}, "a checkpoint of c51"),
        ({"weights": {}}, "damaged"),
        ({"agent": None, "args": {"batch_size": 0}, "global_step": 1, "weights": {}}, "--batch-size is 0"),
        ({"agent": None, "args": {"no_such_flag": 1}, "global_step": 1, "weights": {}}, "damaged"),
    ],
)
def test_a_wrong_checkpoint(agent, monkeypatch, capsys, tmp_path, content, words):
    path = tmp_path / "model.pt"
    if isinstance(content, dict):
        own = {"agent": agent.AGENT} if content.get("agent", "") is None else {}
        torch.save(content | own, path)
    else:
        path.write_bytes(content)
    error = refused(agent, monkeypatch, capsys, tmp_path, "--eval-only", "--checkpoint", "model.pt")
    assert words in error


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_checkpoint_cannot_run_code(agent, monkeypatch, capsys, tmp_path):
    torch.save({"agent": agent.AGENT, "weights": Payload()}, tmp_path / "model.pt")
    refused(agent, monkeypatch, capsys, tmp_path, "--eval-only", "--checkpoint", "model.pt")
    assert not (tmp_path / "pwned").exists()


def test_an_unknown_flag(agent, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--no-such-flag", "3"])
    with pytest.raises(SystemExit) as exit_:
        agent.parse_args()
    assert exit_.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_help_is_grouped_and_says_what_each_flag_means(path):
    shown = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    boxes = re.findall(r"─ (\w+) options ─", shown.stdout)
    assert boxes == ["run", "environment", "training", "algorithm"]
    training = shown.stdout.partition("training options")[2]
    assert "--batch-size INT" in training and "transitions per update" in training and "(default: 32)" in training


def test_the_flags_in_the_readme_exist():
    known = set()
    for path in [*AGENTS, *(ROOT / "benchmarks").glob("*.py"), ROOT / "analysis" / "__main__.py"]:
        known |= {
            name.replace("_", "-") for name in re.findall(r"^    (\w+): .+ = .+  # ", path.read_text(), re.MULTILINE)
        }
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text))
    assert named > {"batch-size", "env-id", "n-step"}
    other = {"help", "logdir", "requirement", "signal", "hypothesis-profile"}  # of other programs
    assert {flag.removeprefix("no-") for flag in named} - known - other == set()


def test_the_commands_in_the_readme_name_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"(?:agents|benchmarks|tests)/\w+\.\w+", text):
        assert (ROOT / name).exists(), name


def test_the_progress_bar_in_a_terminal(tmp_path):
    """With stderr on a terminal there is a live bar, with the speed, the time left, the return and epsilon."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # 24 rows of 120 columns
    command = [
        sys.executable,
        ROOT / "agents" / "dqn.py",
        "--env-id",
        "MinAtar/Breakout-v1",
        "--total-timesteps",
        "3000",
    ]
    command += ["--learning-starts", "500", "--buffer-size", "1000", "--eval-episodes", "0", "--no-cuda"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, cwd=tmp_path, text=True)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    out = process.communicate()[0]
    assert process.returncode == 0
    text = shown.decode()
    assert text.count("\r") > 3
    assert re.search(r"3000/3000 \[\d\d:\d\d<00:00, [\d.]+ steps/s, return [\d.]+, epsilon [\d.]+\]", text)
    assert "step " not in out  # no plain lines beside the bar
