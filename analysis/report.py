"""Write a study's tables and figures, and report.html: one page that holds them all and needs no other file."""

import base64
import csv
import html
import io
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

from analysis import figures
from analysis.results import Results, Table, tables
from analysis.runs import BadInput

MARK = "analysis.json"  # a folder that has it was written by this program, and may be replaced
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

    A folder that this program wrote before is replaced, cache and all but this; any other that is not empty is refused:
    BadInput.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
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
        (aside / MARK).write_text(json.dumps({"written_by": "python -m analysis", "command": command}, indent=2))
        names = sorted(path.name for path in aside.iterdir())
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
        shutil.rmtree(aside, ignore_errors=True)
    return names


def check_out(out: Path) -> None:
    """Raise BadInput if `out` is a file, or a folder with something in it that this program did not write."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file: name a folder with --out.")
    if out.exists() and any(path.name != "cache" for path in out.iterdir()) and not (out / MARK).exists():
        raise BadInput(f"{out} holds files that are not of this analysis: name another folder with --out.")


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
    study = results.study
    games = f"{len(study.games)} game{'s' * (len(study.games) != 1)}"
    counted = f", {len(study.scored)} of them in the aggregates" if study.scored != study.games else ""
    return (
        f"{len(study.groups)} settings, {games}{counted}, {study.seeds}, {study.frames[-1]:,} emulator frames. "
        f"Scores: {study.unit}. Intervals: 95%, stratified bootstrap of {results.resamples:,} resamples. By {command}"
    )


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
