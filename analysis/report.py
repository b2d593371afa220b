"""Write a study's tables and figures, and report.html: one page that holds all but tables longer than LONG."""

import base64
import csv
import html
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from analysis import figures
from analysis.results import CURVE_RESAMPLES, Results, Table, tables
from analysis.runs import BadInput

MARK = "analysis.json"  # lists what this program wrote to a folder, and may replace
LONG = 400  # rows: longer tables are only in the CSV files

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .2rem .7rem; text-align: right }
th { cursor: pointer; border-bottom: 2px solid #444; white-space: nowrap } td { border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child, td.text, th.text { text-align: left } tbody tr:hover { background: #f4f4f4 }
th[aria-sort=ascending]::after { content: " \\25B2" } th[aria-sort=descending]::after { content: " \\25BC" }
.scroll { overflow-x: auto } figure { margin: 1rem 0 } figure img { max-width: 100% }
.warning { color: #a33 } .wide { max-width: none }
"""
SCRIPT = """
document.querySelectorAll("table").forEach(table => {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => {
      const cell = row.cells[column], number = cell.dataset.value;
      return number === undefined ? cell.textContent : number === "" ? NaN : Number(number);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // what is not known comes last
      return (down ? -1 : 1) * (typeof x === "number" ? x - y : x.localeCompare(y));
    });
    table.tBodies[0].append(...rows);
  }));
});
"""


def write_report(results: Results, out: Path, command: str) -> list[str]:
    """Write everything to the folder `out`, all or nothing, and return the names of the files.

    A folder that this program wrote before, and to which nothing was added, is replaced; any other that is not empty is
    refused: BadInput.
    """
    out = out.resolve()
    check_out(out)
    aside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        os.chmod(aside, 0o755)
        made = tables(results)
        for table in made:
            write_csv(table, aside / f"{table.name}.csv")
        (aside / "report.md").write_text(markdown(results, made, command))
        pictures = []
        for name, title, figure in figures.draw(results):
            for kind, facts in (("png", {}), ("svg", {"metadata": {"Date": None}})):
                figure.savefig(aside / f"{name}.{kind}", **facts)
            pictures.append((name, title, (aside / f"{name}.svg").read_bytes()))
        (aside / "report.html").write_text(page(results, made, pictures, command))
        names = sorted([MARK, *(path.name for path in aside.iterdir())])
        (aside / MARK).write_text(json.dumps({"command": command, "files": names}, indent=2))
        if (out / "cache").exists():
            (out / "cache").rename(aside / "cache")
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        if out.exists():
            out.rename(old / out.name)
        aside.rename(out)
        shutil.rmtree(old)
    except OSError as error:
        raise BadInput(f"{error.filename or out} could not be written: {error.strerror}.") from None
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    return names


def check_out(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise BadInput unless `out` may be written: it is new, empty, or holds what this program wrote and no more."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file: name a folder with --out.")
    if Path.cwd().is_relative_to(out):
        raise BadInput(f"--out must not be the folder you are in, or one above: {out}.")
    for path in inputs:
        if path.resolve().is_relative_to(out):
            raise BadInput(f"{path}, which is to be read, is in the folder of --out: name another.")
    if others := [folder for folder in out.parents if (folder / MARK).exists()]:
        raise BadInput(f"{out} is in {others[0]}, the folder of another analysis: name one beside it with --out.")
    if not out.exists():
        return
    try:
        known = {"cache", *json.loads((out / MARK).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        known = {"cache"}
    if others := sorted(path.name for path in out.iterdir() if path.name not in known):
        raise BadInput(f"{out} holds {others[0]}, which is not of this analysis: name another folder with --out.")


def write_csv(table: Table, path: Path) -> None:
    """Write a table with all its digits; what is not known is empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(table.rows)


def shown(value, digits: int) -> str:
    """A cell as it is printed."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:,.{digits}f}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def facts(results: Results, command: str) -> str:
    """Return what was analysed and how, in a few sentences."""
    study, few = results.study, min(results.resamples, CURVE_RESAMPLES)
    counted = f", {len(study.scored)} of them in the aggregates" if study.scored != study.games else ""
    counted = f"{results.counted(study.games)}{counted}, {study.frames[-1]:,} frames"
    counted = f"{len(study.groups)} setting{'s' * (len(study.groups) != 1)}, {counted}"
    drawn = f"{results.resamples:,} resamples ({few:,} of curves and profiles)"
    return f"{counted}. Scores: {study.unit}. Intervals: 95%, stratified bootstrap, {drawn}. By {command}"


def markdown(results: Results, made: list[Table], command: str) -> str:
    """The notes and the shorter tables."""
    lines = ["# Report", "", facts(results, command), ""]
    lines += [f"- {note}" for note in results.study.notes] + [""] * bool(results.study.notes)
    for table in made:
        lines += [f"## {table.title}", ""]
        if len(table.rows) > LONG:
            lines += [f"{len(table.rows):,} rows: {table.name}.csv", ""]
            continue
        lines += ["| " + " | ".join(table.columns) + " |", "|-" * len(table.columns) + "|"]
        lines += ["| " + " | ".join(shown(value, table.digits) for value in row) + " |" for row in table.rows] + [""]
    return "\n".join(lines)


def page(results: Results, made: list[Table], pictures: list[tuple[str, str, bytes]], command: str) -> str:
    """Return report.html: pictures and script are part of it."""
    text = io.StringIO()
    text.write(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Report</title><style>{STYLE}</style>')
    text.write('<meta name="viewport" content="width=device-width"><h1>Report</h1>')
    text.write(f"<p>{html.escape(facts(results, command))}</p>")
    if results.study.notes:
        text.write("<h2>To know</h2><ul>")
        for note in results.study.notes:
            kind = ' class="warning"' if note.startswith("Warning") else ""
            text.write(f"<li{kind}>{html.escape(note)}</li>")
        text.write("</ul>")
    for table in made[:2]:
        _table(text, table)
    for name, title, picture in pictures:
        source = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
        text.write(f'<h2>{html.escape(title)}</h2><figure><img id="{name}" alt="{html.escape(title)}" src="{source}">')
        text.write("</figure>")
    for table in made[2:]:
        _table(text, table)
    text.write(f"<script>{SCRIPT}</script></html>")
    return text.getvalue()


def _table(text: io.StringIO, table: Table) -> None:
    text.write(f"<h2>{html.escape(table.title)}</h2>")
    if len(table.rows) > LONG:
        text.write(f"<p>{len(table.rows):,} rows: {table.name}.csv, beside this page.</p>")
        return
    texts = [any(isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]
    text.write(f'<div class="scroll"><table id="{table.name}"><thead><tr>')
    for column, is_text in zip(table.columns, texts, strict=True):
        text.write(f"<th{' class=text' * is_text}>{html.escape(column)}</th>")
    text.write("</tr></thead><tbody>")
    for row in table.rows:
        text.write("<tr>")
        for value, is_text in zip(row, texts, strict=True):
            printed = html.escape(shown(value, table.digits))
            number = "" if value is None else repr(value).replace("inf", "Infinity")
            text.write(f"<td class=text>{printed}</td>" if is_text else f'<td data-value="{number}">{printed}</td>')
        text.write("</tr>")
    text.write("</tbody></table></div>")
