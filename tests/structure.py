"""Figures of the structure of dmin/: `python tests/structure.py` prints them and their limits."""

import ast
import json
import re
import statistics
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

TOP = Path(__file__).parents[1]
PACKAGE = TOP / "dmin"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(TOP).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the package, for typing and inside of functions included."""
    found: dict[str, set[str]] = {}
    for name, file in known.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {each if each in known else node.module for each in inside}
        found[name] = {each for each in named if each in known and each != name}
    return found


def circle() -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    try:
        TopologicalSorter(imports(modules())).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node
        for file in modules().values()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    first, *rest = function.body
    if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
        return rest[-1].end_lineno - first.end_lineno if rest else 0
    return function.end_lineno - first.lineno + 1


def undocumented() -> tuple[int, int]:
    """Public modules, classes and functions without a docstring, and how many there are."""
    lacking = total = 0

    def visit(node: ast.AST, public: bool) -> None:
        nonlocal lacking, total
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                shown = public and not child.name.startswith("_")
                total += shown
                lacking += shown and ast.get_docstring(child) is None
                visit(child, shown and isinstance(child, ast.ClassDef))

    for file in modules().values():
        tree = ast.parse(file.read_text())
        total += 1
        lacking += ast.get_docstring(tree) is None
        visit(tree, True)
    return lacking, total


def annotated() -> float:
    """The share of arguments and returns that are annotated."""
    have = total = 0
    for function in functions():
        a = function.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        hints = [x.annotation for x in given if x.arg not in ("self", "cls")] + [function.returns]
        have += sum(hint is not None for hint in hints)
        total += len(hints)
    return have / total


def worst_complexity() -> tuple[int, str]:
    """The largest cyclomatic complexity of a function, and where, as ruff counts (C901)."""
    limit = ["--config", "lint.mccabe.max-complexity=1", "--output-format", "json"]
    command = [sys.executable, "-m", "ruff", "check", "--select", "C901", *limit, str(PACKAGE)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    return max(
        (int(re.search(r"\((\d+) > 1\)", each["message"])[1]), each["message"].split("`")[1])
        for each in found
    )


def figures() -> list[tuple[str, str, str, bool]]:
    """Name, value, limit and whether it is kept, of each figure."""
    texts = {file: file.read_text() for file in modules().values()}
    lengths = sorted(map(body_lines, functions()))
    long = {f.relative_to(TOP).as_posix(): t.count("\n") for f, t in texts.items()}
    long = {name: lines for name, lines in long.items() if lines > 300}
    loose = [f for f in PACKAGE.glob("*.py") if not f.name.startswith("__")]
    crowded = max(
        len(list(folder.glob("*.py"))) for folder in PACKAGE.rglob("*") if folder.is_dir()
    )
    ring, (lacking, public), hints = circle(), undocumented(), annotated()
    complexity, where = worst_complexity()
    ignored = sum(text.count("type: ignore") for text in texts.values())
    lines = sum(text.count("\n") for text in texts.values())
    middle, upper = statistics.median(lengths), lengths[int(0.95 * len(lengths))]
    return [
        ("import circles", " → ".join(ring) or "0", "0", not ring),
        ("loose modules in dmin/", f"{len(loose)}", "8", len(loose) <= 8),
        ("most files in a folder", f"{crowded}", "22", crowded <= 22),
        ("files over 300 lines", f"{len(long)} {long or ''}".strip(), "5", len(long) <= 5),
        ("lines of a function, median", f"{middle:g}", "8", middle <= 8),
        ("lines of a function, 95th percentile", f"{upper}", "35", upper <= 35),
        ("worst complexity", f"{complexity} ({where})", "15", complexity <= 15),
        ("public docstrings lacking", f"{lacking} of {public}", "0", not lacking),
        ("annotations", f"{hints:.1%}", "97 %", hints >= 0.97),
        ("type: ignore", f"{ignored}", "30", ignored < 30),
        ("lines of dmin/", f"{lines:,}", "31,900", lines <= 31_900),
    ]


if __name__ == "__main__":
    for name, value, limit, kept in figures():
        print(f"{'  ' if kept else '! '}{name:38} {value:>12}   limit {limit}")
