"""The agents repeat each other on purpose; these tests keep the copies from drifting apart."""

import ast
import difflib
import itertools
import re
import tomllib

import pytest
from conftest import AGENTS, ROOT, load
from sync import OWN, blocks, replaced, shared

SOURCES = {path.stem: path.read_text() for path in AGENTS}
LONGEST = {  # beside all that dqn.py has, recording and resuming included:
    "qrdqn": 915,  # quantiles, and the study's knobs
    "iqn": 920,  # the cosine embedding
    "rainbow": 970,  # two losses, and noisy, dueling and double, each to be switched
    "der": 985,  # noisy layers, C51, LifeStack
    "drq_eps": 950,  # augmentation, LifeStack
    "spr": 1075,  # der.py, augmentation, transition model, sequences
    "cql_offline": 1020,  # instead of a replay of its own steps and of Recorder: reading a dataset; three losses
}
LESSONS = [("rainbow", "der", 145), ("der", "drq_eps", 145), ("der", "spr", 170)]
GROUPS = ["RunArgs", "EnvironmentArgs", "TrainingArgs", "AlgorithmArgs"]


def fields(source):
    """{flag: (group, type, help)} of an agent's argument classes."""
    found = {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in GROUPS:
            for item in node.body:
                help_text = lines[item.lineno - 1].partition("  # ")[2]
                found[item.target.id] = (node.name, ast.unparse(item.annotation), help_text)
    return found


def test_one_name_has_one_source_text():
    for (a, left), (b, right) in itertools.combinations(SOURCES.items(), 2):
        left, right = shared(left), shared(right)
        assert len(left.keys() & right.keys()) > 10
        different = [name for name in left.keys() & right.keys() if left[name] != right[name]]
        assert not different, f"{different} differ between {a} and {b}: rename, or `make sync`"


def test_a_shared_flag_has_one_type_and_one_help_text():
    for (a, left), (b, right) in itertools.combinations(SOURCES.items(), 2):
        left, right = fields(left), fields(right)
        different = [name for name in left.keys() & right.keys() if left[name] != right[name]]
        assert not different, f"{different} differ between {a} and {b}"


@pytest.mark.parametrize("name", SOURCES)
def test_every_flag_has_a_help_text_and_is_read(name):
    tree = ast.parse(SOURCES[name])
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    flags = fields(SOURCES[name])
    assert len(flags) > 25
    assert [flag for flag in flags if not flags[flag][2]] == []
    assert set(flags) - read == set()


@pytest.mark.parametrize("name", SOURCES)
def test_batch_size_feeds_sampling_and_nothing_else(name):
    """Else the study is confounded: a batch size must not change a learning rate or an epsilon in passing."""
    tree = ast.parse(SOURCES[name])
    refusals = [  # `if` statements that do nothing but refuse wrong flags
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.If)
        and [ast.unparse(getattr(getattr(x, "value", x), "func", x)) for x in n.body + n.orelse] == ["fail"]
    ]
    refusing = {id(n) for refusal in refusals for n in ast.walk(refusal)}
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "batch_size"]
    uses = [n for n in uses if id(n) not in refusing]
    sampling = [
        n.args[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "replay.sample" and n.args
    ]
    assert len(uses) == 1 and uses == sampling
    assert not re.search(r"[\"']batch_size[\"']", SOURCES[name])


def test_sections_stand_in_the_same_order():
    banners = {name: re.findall(r"^ *# -{20,} (.+)$", source, re.MULTILINE) for name, source in SOURCES.items()}
    for name, found in banners.items():
        played = name == "cql_offline" and ["act", "step", "store"]
        assert found == [banner for banner in banners["dqn"] if not played or banner not in played], name
    assert banners["dqn"][-7:] == ["act", "step", "store", "learn", "target", "log", "checkpoint"]


@pytest.mark.parametrize("name", SOURCES)
def test_the_heart_is_short_and_the_file_is_one_sitting(name):
    source = SOURCES[name]
    heart = re.search(r"^# -+ act, the target, the loss\n(.*?)^# ---", source, re.MULTILINE | re.DOTALL)[1]
    assert sum(b - a for a, b in blocks(heart).values()) <= 40
    assert len(ast.get_docstring(ast.parse(source)).splitlines()) <= 20
    assert not re.search(r"\.squeeze\(\)", source)
    assert len(source.splitlines()) <= LONGEST.get(name, 900)


@pytest.mark.parametrize(
    ("one", "other", "most"), [("dqn", "qrdqn", 60), ("qrdqn", "iqn", 80), ("dqn", "rainbow", 125), *LESSONS]
)
def test_the_difference_between_neighbours_is_a_lesson(one, other, most):
    lines = difflib.ndiff(SOURCES[one].splitlines(), SOURCES[other].splitlines())
    assert sum(line[:2] in ("- ", "+ ") for line in lines) <= most


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_an_agent_imports_packages_only(path):
    modules = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in modules if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in modules if isinstance(node, ast.ImportFrom)}
    local = {p.stem for p in AGENTS} | {"agents", "analysis", "experiments", "benchmarks", "tests"}
    assert not {name.split(".")[0] for name in names} & local


def pins(text):
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", SOURCES)
def test_script_metadata_has_the_pins_of_requirements(name):
    header = re.search(r"^# /// script\n(.*?)^# ///$", SOURCES[name], re.MULTILINE | re.DOTALL)[1]
    metadata = tomllib.loads("".join(line[2:] for line in header.splitlines(keepends=True)))
    required = pins((ROOT / "requirements.txt").read_text().partition("# benchmarks")[0])
    assert pins("\n".join(metadata["dependencies"])) == required
    assert metadata["requires-python"] == ">=3.11,<3.14"


def test_sync_restores_a_copy_that_drifted():
    source = SOURCES["dqn"]
    drifted = SOURCES["qrdqn"].replace("def sample(self, batch_size: int)", "def sample(self, batch_size)")
    assert shared(drifted) != shared(SOURCES["qrdqn"])
    assert replaced(drifted, source) == SOURCES["qrdqn"]


def test_own_names_exist():
    """The list of exceptions holds nothing that no agent has."""
    assert set(blocks(SOURCES["dqn"])) >= OWN
    assert {load(path).AGENT for path in AGENTS} == set(SOURCES)
