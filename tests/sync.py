"""One name, one meaning: compare the blocks that stand in several agents, or copy them.

    python tests/sync.py agents/dqn.py

overwrites, in every other agent, each top-level block that stands in agents/dqn.py under the same name. A file that you
have put beside the agents stays as it is.
"""

import ast
import sys
from pathlib import Path

NAMES = ["bbf", "cql_offline", "der", "dqn", "drq_eps", "iqn", "ppo", "pqn", "qrdqn", "rainbow", "spr", "sr_spr"]
AGENTS = [Path(__file__).resolve().parent.parent / "agents" / f"{name}.py" for name in NAMES]
OWN = {"train", "Args"}  # may differ between agents


def block_name(node: ast.stmt) -> str | None:
    """The name of a function, class or constant; of `if __name__ == "__main__"` that."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return target.id if isinstance(target, ast.Name) else None
    return "__main__" if isinstance(node, ast.If) else None


def blocks(source: str) -> dict[str, tuple[int, int]]:
    """First line (decorators included) and the line after the last of every top-level block, from 0."""
    spans = {}
    for node in ast.parse(source).body:
        if name := block_name(node):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            spans[name] = (first - 1, node.end_lineno)
    return spans


def shared(source: str) -> dict[str, str]:
    """Source text of every block whose name must mean the same in all agents."""
    lines = source.splitlines(keepends=True)
    return {name: "".join(lines[a:b]) for name, (a, b) in blocks(source).items() if name not in OWN}


def replaced(target: str, source: str) -> str:
    """The text of `target` with its shared blocks taken from `source`."""
    lines = target.splitlines(keepends=True)
    new = shared(source)
    for name, (first, last) in reversed(blocks(target).items()):
        if name in new:
            lines[first:last] = [new[name]]
    return "".join(lines)


if __name__ == "__main__":
    model = Path(sys.argv[1])
    for path in AGENTS:
        old = path.read_text()
        new = replaced(old, model.read_text())
        if old != new:
            path.write_text(new)
            print(f"{path.name}: synced with {model.name}")
