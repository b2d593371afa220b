"""The README and docs/ name only what is there."""

import csv
import re
import subprocess

import pytest
from conftest import ROOT
from sync import NAMES

from experiments.draw import draw
from experiments.plan import find_figure, runs_of, variants_of
from experiments.record import Record

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
AGENTS_TEXT = "\n".join(path.read_text() for path in (ROOT / "agents").glob("*.py"))
README = (ROOT / "README.md").read_text()
LESSONS = re.findall(r"`diff agents/(\w+)\.py agents/(\w+)\.py` \| (\d+)", README)


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 150


def test_the_readme_lists_the_agents_that_are_tested():
    assert sorted(re.findall(r"^\| `agents/(\w+)\.py`", README, re.MULTILINE)) == NAMES


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_each_detail_names_a_test_that_exists_and_code_that_exists():
    rows = (ROOT / "docs" / "details.md").read_text().splitlines()
    details = [row.split(" | ") for row in rows if row.startswith("| **")]
    assert len(details) > 10
    for _, place, guards, _ in details:
        names = re.findall(r"`(test_\w+)`", guards)
        assert names
        for name in names:
            assert f"def {name}(" in TESTS, name
        for name in re.findall(r"`([A-Za-z_]+)`", place):
            assert re.search(rf"(def|class) {name}\b", AGENTS_TEXT), name


@pytest.mark.parametrize(("one", "other", "lines"), LESSONS)
def test_the_lessons_are_as_long_as_the_readme_says(one, other, lines):
    command = ["diff", f"agents/{one}.py", f"agents/{other}.py"]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert abs(len(re.findall(r"^[<>]", changed, re.MULTILINE)) - int(lines)) < 8  # diff programs differ


def test_the_readme_counts_the_runs_of_its_record():
    said = re.findall(r"so far (\d+) of its 100 runs are made", README)
    with open(ROOT / "docs" / "results" / "small_batch_minatar.csv") as file:
        assert said == [str(len(list(csv.DictReader(file))))]


def test_the_table_of_bbf_has_the_scores_and_intervals_of_its_record(tmp_path, capsys):
    """Drawn anew from the record, which has every run of the figure and no other."""
    figure, results = find_figure("bbf"), ROOT / "docs" / "results"
    with open(results / "bbf_minatar.csv") as file:
        scores = {(row["setting"], row["game"], row["seed"]): float(row["score_20"]) for row in csv.DictReader(file)}
    cells = {name: {} for name in variants_of(figure, "minatar")}
    for setting, run in runs_of(figure, "minatar", {}):
        score = scores.pop((run.exp_name, run.env_id, str(run.seed)))
        cells[setting["variant"]].setdefault(run.env_id, []).append(f"{score:.2f}")
    assert not scores

    draw("bbf", figure, "minatar", {}, tmp_path, Record(results / "bbf_minatar.csv"), tmp_path)
    drawn = (tmp_path / "bbf.md").read_text()
    assert drawn == (results / "bbf.md").read_text()
    intervals = re.findall(r"\| bbf \| (.+?) \| (.+?) \| (.+?) to (.+?) †", drawn)
    iqms = {name: f"{iqm} [{low}, {high}]" for name, iqm, low, high in intervals}
    said = capsys.readouterr().out
    beats = dict(re.findall(r"a run with (.+) beats one with spr .* probability (.+?\])", said))

    page = (ROOT / "docs" / "results.md").read_text()
    for name, games in cells.items():
        row = [name, *(", ".join(seeds) for seeds in games.values()), iqms[name], beats.get(name, "")]
        assert f"| {' | '.join(row)} |\n" in page
