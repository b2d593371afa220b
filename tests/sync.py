"""One name, one meaning: compare the functions and classes that stand in several agents, or copy them.

    python tests/sync.py agents/dqn.py

overwrites, in every other agent, each top-level function or class that stands in agents/dqn.py under the same name.
"""

import ast
import sys
from pathlib import Path

AGENTS = sorted((Path(__file__).resolve().parent.parent / "agents").glob("*.py"))
OWN = {"train", "Args", "RunArgs", "EnvironmentArgs", "TrainingArgs", "AlgorithmArgs"}  # may differ between agents


def blocks(source: str) -> dict[str, tuple[int, int]]:
    """First line (decorators included) and the line after the last of every top-level function and class, from 0."""
    spans = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            spans[node.name] = (first - 1, node.end_lineno)
    return spans


def shared(source: str) -> dict[str, str]:
    """Source text of every block whose name must mean the same in all agents."""
    lines = source.splitlines(keepends=True)
    return {name: "".join(lines[a:b]) for name, (a, b) in blocks(source).items() if name not in OWN}


def replaced(target: str, source: str) -> str:
    """The text of `target` with its shared blocks taken from `source`."""
    lines, new = target.splitlines(keepends=True), shared(source)
    for name, (first, last) in reversed(blocks(target).items()):
        if name in new:
            lines[first:last] = [new[name]]
    return "".join(lines)


if __name__ == "__main__":
    model = Path(sys.argv[1])
    for path in AGENTS:
        old, new = path.read_text(), replaced(path.read_text(), model.read_text())
        if old != new:
            path.write_text(new)
            print(f"{path.name}: synced with {model.name}")
