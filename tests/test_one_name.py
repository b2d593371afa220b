"""The agents repeat each other on purpose; these tests keep the copies from drifting apart, and the files readable."""

import ast
import difflib
import itertools
import re
import tomllib

import pytest
from conftest import AGENTS, ON_POLICY, ROOT
from sync import OWN, blocks, replaced, shared

SOURCES = {path.stem: path.read_text() for path in AGENTS}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
FIRST_BANNER = re.compile(r"^# =+ the algorithm =+$", re.MULTILINE)
SECOND_BANNER = re.compile(r"^# =+ from here on the same text in every agent =+$", re.MULTILINE)
CEILINGS = {  # lines above the second banner, lines, bytes
    "dqn": (300, 720, 33_000),
    "qrdqn": (340, 780, 37_000),
    "iqn": (340, 780, 37_000),
    "drq_eps": (340, 760, 36_000),
    "rainbow": (420, 880, 42_000),
    "der": (420, 880, 42_000),
    "spr": (480, 960, 46_000),
    "cql_offline": (480, 960, 46_000),
    "sr_spr": (520, 1_020, 49_000),
    "bbf": (520, 1_020, 49_000),
    "pqn": (320, 670, 32_000),
    "ppo": (360, 725, 35_000),
}
LESSONS = [  # changed lines at most
    ("dqn", "qrdqn", 150),
    ("qrdqn", "iqn", 155),
    ("dqn", "rainbow", 210),
    ("rainbow", "der", 155),
    ("der", "drq_eps", 210),
    ("der", "spr", 175),
    ("spr", "sr_spr", 145),
    ("sr_spr", "bbf", 110),
    ("dqn", "pqn", 600),
    ("pqn", "ppo", 210),
]
SECTIONS = [
    "flags",
    "environment",
    "replay",
    "network",
    "diagnostics and evaluation",
    "run folder, log and checkpoints",
]
STEPS = ["evaluate", "act", "step and store", "learn", "log", "checkpoint"]


def flags(name):
    """{flag: (type, help)} of an agent's Args."""
    found = {}
    lines = SOURCES[name].splitlines()
    for node in TREES[name].body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    kind = ast.unparse(item.annotation)
                    found[item.target.id] = (kind, lines[item.lineno - 1].partition("  # ")[2])
    return found


def above_second_banner(name):
    return SOURCES[name][: SECOND_BANNER.search(SOURCES[name]).start()]


def test_one_name_has_one_source_text():
    for (a, left), (b, right) in itertools.combinations(SOURCES.items(), 2):
        left, right = shared(left), shared(right)
        assert len(left.keys() & right.keys()) > 18
        different = [name for name in left.keys() & right.keys() if left[name] != right[name]]
        assert not different, f"{different} differ between {a} and {b}: rename, or `make sync`"


def test_below_the_second_banner_is_nothing_but_shared_blocks_and_section_names():
    for source in SOURCES.values():
        start = source[: SECOND_BANNER.search(source).start()].count("\n")
        lines = source.splitlines()
        in_blocks = set()
        for first, last in blocks(source).values():
            in_blocks |= set(range(first, last))
        others = {lines[i] for i in range(start + 1, len(lines)) if i not in in_blocks and lines[i]}
        assert others <= {f"# ---- {section}" for section in SECTIONS}


def test_a_shared_flag_has_one_type_and_one_help_text():
    for a, b in itertools.combinations(SOURCES, 2):
        left, right = flags(a), flags(b)
        for flag in left.keys() & right.keys():
            types = {kind.removesuffix(" | None") for kind, _ in (left[flag], right[flag])}  # cql_offline fills it in
            assert len(types) == 1 and left[flag][1] == right[flag][1], f"{flag} differs between {a} and {b}"


@pytest.mark.parametrize("name", SOURCES)
def test_every_flag_has_a_help_text_and_is_read(name):
    read = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args":
            read.add(node.attr)
    found = flags(name)
    assert len(found) > 25
    assert [flag for flag, (_, text) in found.items() if not text] == []
    assert found.keys() - read == set()


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - ON_POLICY))
def test_batch_size_feeds_sampling_and_nothing_else(name):
    """Else the study is confounded: a batch size must not change a learning rate or an epsilon in passing."""
    uses = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute) and node.attr == "batch_size"]
    refusals = [node for node in uses if ast.unparse(node) == "self.batch_size"]
    sampling = [
        node.args[0]
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "replay.sample"
    ]
    assert [node for node in uses if node not in refusals] == sampling
    assert len(sampling) == 1
    assert len(refusals) == (2 if name == "qrdqn" else 0)  # --batch-divisor must divide it
    assert not re.search(r"[\"']batch_size[\"']", SOURCES[name])


@pytest.mark.parametrize("name", SOURCES)
def test_the_algorithm_comes_first_and_sections_stand_in_one_order(name):
    source = SOURCES[name]
    assert source.index("class Args") < FIRST_BANNER.search(source).start() < source.index("\ndef train")
    assert source.index("\ndef train") < SECOND_BANNER.search(source).start()
    sections = [section for section in SECTIONS if section != "replay" or name not in ON_POLICY]
    assert re.findall(r"^# ---- (.+)$", source, re.MULTILINE) == sections
    steps = re.findall(r"^ {8}# ---- (.+)$", source, re.MULTILINE)
    if name == "cql_offline":
        assert steps == ["evaluate", "load checkpoints of the dataset", "learn", "log", "checkpoint"]
    elif name in ON_POLICY:
        assert steps == ["evaluate", "play a roll-out", "learn", "log", "checkpoint"]
    else:
        assert steps == STEPS


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_is_one_sitting(name):
    source = SOURCES[name]
    lines = source.splitlines()
    above, whole, size = CEILINGS[name]
    assert above_second_banner(name).count("\n") <= above
    assert len(lines) <= whole
    assert len(source.encode()) <= size
    assert len(ast.get_docstring(TREES[name]).splitlines()) <= 20


@pytest.mark.parametrize("name", SOURCES)
def test_lines_are_airy(name):
    lines = SOURCES[name].splitlines()
    assert sum(len(line) for line in lines) / len(lines) <= 50
    assert max(len(line) for line in lines) <= 120
    assert not re.search(r"\.squeeze\(\)", SOURCES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert not isinstance(node.value, ast.Tuple) or len(node.value.elts) < 3, f"line {node.lineno}"


@pytest.mark.parametrize("name", SOURCES)
def test_target_and_loss_are_short(name):
    heart = {
        block: last - first
        for block, (first, last) in blocks(above_second_banner(name)).items()
        if block.endswith(("_target", "_loss")) or block in ("project", "importance_weights", "gae")
    }
    assert len(heart) >= 2
    assert sum(heart.values()) <= 40


@pytest.mark.parametrize(("one", "other", "most"), LESSONS)
def test_the_difference_between_neighbours_is_a_lesson(one, other, most):
    lines = difflib.ndiff(SOURCES[one].splitlines(), SOURCES[other].splitlines())
    assert sum(line[:2] in ("- ", "+ ") for line in lines) <= most


@pytest.mark.parametrize("name", SOURCES)
def test_an_agent_imports_packages_only(name):
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert not names & (SOURCES.keys() | {"agents", "analysis", "experiments", "benchmarks", "tests", "enjoy"})


def pins(text):
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", SOURCES)
def test_script_metadata_has_the_pins_of_requirements(name):
    header = re.search(r"^# /// script\n(.*?)^# ///$", SOURCES[name], re.MULTILINE | re.DOTALL)[1]
    metadata = tomllib.loads("".join(line[2:] for line in header.splitlines(keepends=True)))
    required = pins((ROOT / "requirements.txt").read_text().partition("# enjoy.py")[0])
    assert pins("\n".join(metadata["dependencies"])) == required
    assert metadata["requires-python"] == ">=3.11,<3.14"


def test_sync_restores_a_copy_that_drifted():
    drifted = SOURCES["qrdqn"].replace("def sample(self, batch_size: int, ", "def sample(self, batch_size, ")
    drifted = drifted.replace("STOPPED_BY: list[int] = []", "STOPPED_BY = []")
    assert shared(drifted) != shared(SOURCES["qrdqn"])
    assert replaced(drifted, SOURCES["dqn"]) == SOURCES["qrdqn"]


def test_own_names_exist():
    """The list of exceptions holds nothing that no agent has."""
    assert set(blocks(SOURCES["dqn"])) >= OWN
