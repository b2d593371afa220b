"""The study's figures, and three more, as data: what each asks, and which runs answer it.

Obando-Ceron, Bellemare and Castro, "Small batch deep reinforcement learning", 2023. What the study leaves open is ours,
and marked so; everything named minatar is. Every value in `varied` meets every other; a figure has `panels` for some of
these flags and a `line` for the values of another.
"""

from dataclasses import dataclass, field

BATCH_SIZES = (8, 16, 32, 64)
STUDY = ("dqn", "rainbow", "qrdqn", "iqn")
HARD = ("Freeway", "Gravitar", "MontezumaRevenge", "Pitfall", "PrivateEye", "Solaris", "Venture")  # to explore: ours,
# the seven of Bellemare et al., "Unifying count-based exploration and intrinsic motivation", 2016
HARD_IN_MINATAR = ("Freeway", "Seaquest")


@dataclass(frozen=True)
class Figure:
    asks: str  # the question, in a sentence
    draw: str  # curves, games, gains, time, diagnostics or measures: a function of analysis/panels.py
    agents: tuple[str, ...]  # files in agents/
    varied: dict[str, tuple]  # flag -> its values
    games: str | tuple[str, ...] = "fedus20"  # a list of analysis/data/game_lists.csv, or names
    seeds: int = 3
    steps: int = 25_000_000  # agent steps: 4 emulator frames each
    panels: tuple[str, ...] = ("agent",)
    line: str = "batch_size"
    flags: dict = field(default_factory=dict)  # the same in all runs
    variants: dict[str, dict] = field(default_factory=dict)  # name -> flags that go together; "variant" in panels

    # the same question on MinAtar
    minatar_steps: int = 500_000
    minatar_games: tuple[str, ...] = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
    minatar_varied: dict[str, tuple] = field(default_factory=dict)  # values that differ there
    minatar_variants: dict[str, dict] = field(default_factory=dict)  # variants that differ there
    minatar_seeds: int = 0  # 0: as many as on Atari, and five at least
    atari_only: bool = False  # asks for what MinAtar does not have
    marks: tuple[int, ...] = ()  # agent steps to draw a line at
    smoke_steps: int = 0  # at --scale smoke, where the usual ones are too few


SMALL_AND_USUAL = {"batch_size": (8, 32)}  # in the long runs: ours
ALL_GAMES = {"agents": ("qrdqn",), "varied": SMALL_AND_USUAL, "games": "atari60"}
NETWORKS = {"agents": ("qrdqn",), "atari_only": True}
LONG = {"steps": 50_000_000, "minatar_steps": 1_000_000}
SAMPLE_EFFICIENT = {
    "agents": ("der", "spr", "drq_eps"),
    "varied": {"batch_size": BATCH_SIZES},
    "games": "atari100k_26",
    "seeds": 6,
}
NO_EXPLORATION = {"agents": ("qrdqn",), "varied": {"batch_size": BATCH_SIZES, "end_e": (0.0, 0.01)}}
DIVIDED = {
    "agents": ("qrdqn",),
    "varied": {"batch_divisor": (1, 2, 4, 8)},  # ours
    "flags": {"batch_size": 32},
    "line": "batch_divisor",
}
NOISY_TARGETS = {
    "agents": ("qrdqn",),
    "varied": {"batch_size": (8, 32), "target_noise_std": (0.0, 0.01, 0.1, 1.0)},  # ours
    "panels": ("batch_size",),
    "line": "target_noise_std",
}

# the components of the compact Rainbow, as rainbow.py's switches; with all of them off it is DQN
ALL_OFF = {"n_step": 1, "prioritized": False, "distributional": False}
ALL_ON = {"n_step": 3, "prioritized": True, "distributional": True}
ADDED = {
    "dqn": ALL_OFF,
    "+ n-step": ALL_OFF | {"n_step": 3},
    "+ prioritized": ALL_OFF | {"prioritized": True},
    "+ distributional": ALL_OFF | {"distributional": True},
}
REMOVED = {
    "rainbow": ALL_ON,
    "- n-step": ALL_ON | {"n_step": 1},
    "- prioritized": ALL_ON | {"prioritized": False},
    "- distributional": ALL_ON | {"distributional": False},
}

# what SR-SPR and BBF add to SPR, all with two updates a step
HEIRS = {
    "spr": {"agent": "spr"},
    "sr_spr": {"agent": "sr_spr", "replay_ratio": 2},
    "bbf": {},
    "bbf without resets": {"reset_interval": 0},
    "bbf without schedules": {"initial_n_step": 3, "initial_gamma": 0.997},
    "bbf without self-prediction": {"spr_weight": 0.0},
}
HEIRS_IN_MINATAR = {  # one update a step: a day on two cores
    "spr": {"agent": "spr", "updates_per_step": 1, "batch_size": 8},
    "sr_spr": {"agent": "sr_spr"},
}

# games side by side and steps of each in a roll-out, ours: three with as much data, one with sixteen times that
ROLLOUTS = {
    "8 x 128": {"num_envs": 8, "num_steps": 128},
    "32 x 32": {"num_envs": 32, "num_steps": 32},
    "128 x 8": {"num_envs": 128, "num_steps": 8},
    "128 x 128": {"num_envs": 128, "num_steps": 128},
}

FIGURES = {
    "fig2.1": Figure(
        "Does a smaller batch help four agents that learn from multi-step returns, or from one-step ones?",
        "curves",
        STUDY,
        {"batch_size": BATCH_SIZES},
    ),
    "fig2.2": Figure("In how many of all games does QR-DQN gain by a batch of 8?", "gains", **ALL_GAMES),
    "fig2.3": Figure("How does QR-DQN learn each game with a batch of 8, and of 32?", "games", **ALL_GAMES),
    "fig2.4": Figure("Does QR-DQN gain by a batch of 8 over all games together?", "curves", **ALL_GAMES),
    "fig2.5": Figure(
        "Does a smaller batch help larger networks, too?",
        "curves",
        **NETWORKS,
        varied={"network": ("dopamine-x4", "impala"), "batch_size": BATCH_SIZES},
        panels=("network",),
    ),
    "fig2.6": Figure(
        "In which games does it help convolutions four times as wide?",
        "games",
        **NETWORKS,
        varied={"batch_size": BATCH_SIZES},
        flags={"network": "dopamine-x4"},
    ),
    "fig2.7": Figure(
        "In which games does it help a residual network?",
        "games",
        **NETWORKS,
        varied={"batch_size": BATCH_SIZES},
        flags={"network": "impala"},
    ),
    "fig2.8": Figure(
        "Does a smaller batch help the agents of Atari 100k?",
        "curves",
        **SAMPLE_EFFICIENT,
        steps=100_000,
        minatar_steps=100_000,
    ),
    "fig2.9": Figure(
        "Does it help them if they learn for longer, 30 million frames?",
        "curves",
        **SAMPLE_EFFICIENT,
        steps=7_500_000,
        minatar_steps=300_000,
    ),
    "fig2.10": Figure(
        "Does QR-DQN keep its gain for 200 million frames?", "curves", ("qrdqn",), SMALL_AND_USUAL, **LONG
    ),
    "fig2.11": Figure("Does IQN keep its gain for 200 million frames?", "curves", ("iqn",), SMALL_AND_USUAL, **LONG),
    "fig2.12": Figure(
        "How do both learn each game in 200 million frames?",
        "games",
        ("qrdqn", "iqn"),
        SMALL_AND_USUAL,
        **LONG,
    ),
    "fig2.13": Figure(
        "Does a small batch explore by itself: what if epsilon falls to 0 in games that are hard to explore?",
        "games",
        **NO_EXPLORATION,
        games=HARD,
        minatar_games=HARD_IN_MINATAR,
        panels=("end_e",),
    ),
    "fig2.14": Figure("What if epsilon falls to 0, over 20 games?", "curves", **NO_EXPLORATION, panels=("end_e",)),
    "fig2.15": Figure(
        "What does a smaller batch gain in wall-clock time?",
        "time",
        STUDY,
        {"batch_size": BATCH_SIZES},
        flags={"n_step": 3},  # DQN as well
    ),
    "fig2.16": Figure(
        "Is it the learning rate: does another one do what a smaller batch does?",
        "curves",
        ("qrdqn",),
        {"learning_rate": (1.25e-5, 5e-5, 2e-4), "batch_size": BATCH_SIZES},  # ours: a quarter, and four times
        minatar_varied={"learning_rate": (6.25e-5, 2.5e-4, 1e-3)},
        panels=("learning_rate",),
    ),
    "fig2.17": Figure("Is it the number of updates: what if one batch of 32 makes several?", "curves", **DIVIDED),
    "fig2.18": Figure("And game by game, if one batch makes several updates?", "games", **DIVIDED),
    "fig2.19": Figure(
        "Which component, added to DQN, makes a smaller batch the better one?",
        "curves",
        ("rainbow",),
        {"batch_size": BATCH_SIZES},
        variants=ADDED,
        panels=("variant",),
    ),
    "fig2.20": Figure(
        "Which component, taken from Rainbow, makes it the worse one?",
        "curves",
        ("rainbow",),
        {"batch_size": BATCH_SIZES},
        variants=REMOVED,
        panels=("variant",),
    ),
    "fig2.21": Figure(
        "From how many steps in the return on is a smaller batch the better one?",
        "curves",
        ("dqn", "rainbow", "qrdqn"),
        {"n_step": (1, 3, 5), "batch_size": BATCH_SIZES},  # ours
        panels=("agent", "n_step"),
    ),
    "fig2.22": Figure(
        "What does the batch size do to losses, gradients and the network?",
        "diagnostics",
        ("qrdqn",),
        {"batch_size": BATCH_SIZES},
        games=("Asteroids", "DemonAttack", "SpaceInvaders"),
    ),
    "fig2.23": Figure("Is it the noise: what if the learning target has some more?", "curves", **NOISY_TARGETS),
    "fig2.24": Figure("And game by game, with noise on the target?", "games", **NOISY_TARGETS),
    "fig2.25": Figure(
        "Does a smaller batch help where all data is given, offline?",
        "curves",
        ("cql_offline",),
        {"algorithm": ("dqn", "cql-dr3", "cql-c51"), "n_step": (1, 3), "batch_size": BATCH_SIZES},
        games="dr3_17",
        seeds=5,
        steps=50_000_000,
        minatar_steps=250_000,
        panels=("n_step", "algorithm"),
    ),
    "small-batch": Figure(  # fig2.1's question at the size of a laptop: make study
        "Does a smaller batch help DQN, and QR-DQN?",
        "curves",
        ("dqn", "qrdqn"),
        SMALL_AND_USUAL,
        seeds=5,
    ),
    "bbf": Figure(  # not of the study: Schwarzer et al., "Bigger, better, faster", 2023
        "What do resets, schedules and self-prediction add?",
        "curves",
        ("bbf",),
        {},
        games="atari100k_26",
        steps=100_000,
        panels=("agent",),
        line="variant",
        variants=HEIRS,
        minatar_variants=HEIRS_IN_MINATAR,
        minatar_steps=100_000,
        minatar_games=("Asterix", "Breakout", "SpaceInvaders"),
        minatar_seeds=3,
        marks=(20_002, 40_003, 60_004),  # resets
    ),
    "parallel": Figure(  # Mayor et al., "The impact of on-policy parallelized data collection", 2025: its figure 1a
        "What do more games side by side do to a network, in place of longer roll-outs, and beside them?",
        "measures",
        ("ppo", "pqn"),
        {},
        games="atari10",
        seeds=5,
        steps=100_000_000,
        line="variant",
        variants=ROLLOUTS,
        minatar_steps=1_000_000,
        minatar_seeds=3,
        smoke_steps=32_768,
    ),
}

# ---- flags of the scales that are not the study's own: --scale minatar and smoke
# Dopamine's settings for MinAtar, but for epsilon
RATE = {"learning_rate": 2.5e-4, "adam_eps": 3.125e-4}
SUPPORT = {"v_min": -100.0, "v_max": 100.0}
ONLINE = {
    "buffer_size": 100_000,
    "learning_starts": 1_000,
    "target_network_frequency": 1_000,
    "exploration_steps": 100_000,
    "checkpoint_frequency": 50_000,
}
ONE_UPDATE = {"replay_ratio": 1, "batch_size": 8, "reset_interval": 20_000}  # resets at the same steps as with two
OFFLINE = {"target_network_frequency": 1_000, "iteration_steps": 25_000, "eval_steps": 10_000}
MINATAR = {
    "dqn": RATE | ONLINE,
    "qrdqn": RATE | ONLINE,
    "iqn": RATE | ONLINE,
    "rainbow": RATE | ONLINE | SUPPORT,
    "der": RATE | SUPPORT,
    "drq_eps": RATE | {"image_pad": 1},
    "spr": RATE | SUPPORT | {"image_pad": 1},
    "sr_spr": RATE | SUPPORT | ONE_UPDATE | {"image_pad": 1},
    "bbf": RATE | SUPPORT | ONE_UPDATE | {"image_pad": 1, "width_scale": 1, "schedule_updates": 5_000},
    "cql_offline": RATE | SUPPORT | OFFLINE,
    "ppo": {"diagnostics_frequency": 25_000},
    "pqn": {"diagnostics_frequency": 25_000},
}

# minutes for all figures together: two seeds of one game, a hundred updates
SMOKE = {
    "learning_starts": 200,
    "exploration_steps": 100,
    "target_network_frequency": 100,
    "buffer_size": 1_000,
    "checkpoint_frequency": 100,
    "diagnostics_frequency": 100,
    "eval_episodes": 2,
    "eval_steps": 50,
    "max_episode_steps": 60,
    "reset_interval": 200,
    "schedule_updates": 100,
}
SMOKE_STEPS = 400
SMOKE_STEPS_ON_ATARI = 240
