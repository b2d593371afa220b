"""Watch an agent play the weights of its run, as a video or in a window, or read its returns alone.

    python enjoy.py runs/ALE-Pong-v5__qrdqn__1__... --episodes 10 --video pong.mp4
    python enjoy.py runs/ALE-Pong-v5__qrdqn__1__... --render

The weights are those of model.pt (--save-model) or, without one, of checkpoint.pt. The games are those of the run's
evaluation after its last step, played as there (but iqn and ppo draw their fractions and actions anew); --seed gives
others.
Ctrl-C or closing the window ends the playing, and the video there.
"""

import importlib
import json
import signal
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

AGENTS = Path(__file__).resolve().parent / "agents"
WIDTH = 480  # of the pictures, in pixels
EMULATOR = {"grayscale": False, "stack_num": 1, "img_height": 210, "img_width": 160}  # as a television shows it
STOPPED = []  # by Ctrl-C, or by closing the window


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # run folder
    episodes: int = 10  # full games to play
    seed: int | None = None  # of the games and of random actions (none: the run's own)
    epsilon: float | None = None  # share of random actions (none: the run's --eval-epsilon)
    cuda: bool = True  # use a GPU where there is one
    video: Path | None = None  # new MP4 file with all the games
    render: bool = False  # show the games in a window

    def __post_init__(self):
        if self.episodes < 1 or (self.seed or 0) < 0 or not 0 <= (self.epsilon or 0) <= 1:
            fail("--episodes starts at 1, --seed at 0, and --epsilon is from 0 to 1.")
        if self.video and self.video.suffix != ".mp4":
            fail(f"--video is {self.video}: its name must end in .mp4.")
        if self.video and self.video.exists():
            fail(f"--video is {self.video}, which exists: give the name of a new file.")


def fail(message: str):
    """Answer wrong input: one sentence on stderr, exit status 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


# ---- the run
def read_run(folder: Path):
    """Return the module that the run is of, and its flags."""
    path = folder / "args.json"
    if not path.exists():
        fail(f"{folder} {'has no args.json' if folder.is_dir() else 'is no folder'}: give one of those in runs/.")
    try:
        record = json.loads(path.read_text())
        agent, flags = str(record["agent"]), dict(record["args"])
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is damaged: it must have the agent's name and its flags.")
    if agent not in [file.stem for file in AGENTS.glob("*.py")]:
        fail(f"{folder} is a run of {agent}: there is no {AGENTS / agent}.py to play it with.")

    sys.path.insert(0, str(AGENTS))
    module = importlib.import_module(agent)
    flags.update(track=False, resume=None)
    try:
        return module, module.Args(**flags)
    except TypeError as error:
        fail(f"{path} is of another version of {agent}.py: {error}.")


def load_network(folder: Path, module, flags, envs, device) -> torch.nn.Module:
    """Make the agent's network, without noise, with the weights of the run."""
    [network_class] = [item for item in vars(module).values() if hasattr(item, "q_values")]
    network = network_class(envs.single_observation_space.shape, int(envs.single_action_space.n), flags)
    network.to(device, memory_format=torch.channels_last)  # as in training, to the last bit

    path, name = folder / "model.pt", "weights"
    if not path.exists():
        path, name = folder / "checkpoint.pt", "q_network"
        if hasattr(flags, "tau"):
            name = "target_network"  # a moving average acts itself
    if not path.exists():
        fail(f"{folder} has neither model.pt nor checkpoint.pt: there are no weights to play.")
    try:
        if name == "weights" and zipfile.ZipFile(path).testzip():  # a checkpoint would take long
            raise ValueError("a checksum is wrong")
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[name]
    except Exception:  # there are a dozen ways to be damaged or foreign
        fail(f"{path} cannot be read: it is damaged, or no file of these agents.")
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        fail(f"{path} has weights of another network than args.json: {error}")
    return network.eval()


# ---- the pictures
def draw(obs: np.ndarray) -> np.ndarray:
    """Return the picture, (height, WIDTH, 3) bytes, of an emulator's observation."""
    if obs.dtype == bool:  # MinAtar: (1, 10, 10, channels), of which the last that is set shows its colour
        colours = [(0, 0, 0), *matplotlib.colormaps["tab10"].colors]
        shown = obs[0] * np.arange(1, obs.shape[3] + 1)
        pixels = np.uint8(255 * np.array(colours))[shown.max(axis=2)]
    else:
        pixels = obs[0, 0]
    scale = WIDTH // pixels.shape[1]
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def open_video(path: Path, picture: np.ndarray, fps: float):
    """Start an MP4 file of pictures like this one; it takes them by `send`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)
    height, width, _ = picture.shape
    video = imageio_ffmpeg.write_frames(path, (width, height), fps=fps, macro_block_size=2, ffmpeg_log_level="error")
    video.send(None)
    return video


class Window:
    """A window that takes pictures by `send`."""

    def __init__(self, picture: np.ndarray, title: str):
        try:
            self.figure = plt.figure(title, figsize=(5, 5 * picture.shape[0] / WIDTH))
            shows = self.figure.canvas.required_interactive_framework
        except ImportError:  # what MPLBACKEND asks for
            shows = None
        if not shows:
            fail("--render needs a display and a toolkit for windows, such as Tk: use --video where there is none.")
        self.image = self.figure.add_axes([0, 0, 1, 1], frameon=False).imshow(picture)

    def send(self, picture: np.ndarray):
        self.image.set_data(picture)
        plt.pause(0.02)
        if not plt.fignum_exists(self.figure.number):
            STOPPED.append(self)

    def close(self):
        plt.close(self.figure)


def main(args: Args) -> list[float]:
    """Play, and return the raw return of each game that was played to its end."""
    module, flags = read_run(args.run)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = getattr(module, "make_life_env", module.make_env)(flags)
    network = load_network(args.run, module, flags, envs, device)

    seed = flags.seed if args.seed is None else args.seed
    epsilon = flags.eval_epsilon if args.epsilon is None else args.epsilon
    rollout = getattr(flags, "num_envs", 1) * getattr(flags, "num_steps", 1)
    stream = flags.total_timesteps // rollout * rollout  # the last evaluation's
    rng = np.random.default_rng([seed, stream])
    torch.manual_seed(seed)

    # a second emulator, which is given the same seeds and actions, shows the game in colour
    screen = module.make_env(flags, **EMULATOR)
    picture = draw(module.reset(screen, seed, stream, 0))
    viewers = []
    returns = []
    try:
        if args.render:
            viewers.append(Window(picture, args.run.name))
        if args.video:
            fps = 60 / flags.frame_skip if flags.env_id.startswith("ALE/") else 10
            viewers.append(open_video(args.video, picture, fps))

        for episode in range(args.episodes):
            obs = module.reset(envs, seed, stream, episode)
            seen = module.reset(screen, seed, stream, episode)
            episodic_return = 0.0
            done = False
            while True:
                for viewer in viewers:
                    viewer.send(draw(seen))
                if done or STOPPED:
                    break
                actions = module.act(network, obs, epsilon, envs.single_action_space.n, rng, device)
                obs, rewards, terminations, truncations, _ = envs.step(actions)
                seen = screen.step(actions)[0] if viewers else seen
                episodic_return += float(rewards[0])
                done = terminations[0] or truncations[0]
            if STOPPED:
                break
            returns.append(episodic_return)
            print(f"game {episode + 1}: {episodic_return:g}", flush=True)
    except OSError as error:
        fail(f"--video {args.video} cannot be written: {error.strerror or 'ffmpeg has stopped'}.")
    finally:
        for viewer in viewers:
            viewer.close()
    if returns:
        print(f"mean return {np.mean(returns):.2f} of {len(returns)} games")
    return returns


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, _frame: STOPPED.append(number))
    main(tyro.cli(Args, description=__doc__))
