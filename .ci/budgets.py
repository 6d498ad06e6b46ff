"""Prints how many lines of code there are, and fails above a budget.

    python .ci/budgets.py [--files]

A line of code holds a token that is neither a comment nor part of a docstring. Budgets keep the
code small enough to read: the core is what train.py and sample.py need (docs/design.md).
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

# The six rooms of the core, and the files at the top that all of them stand on.
CORE = ("config", "text", "model", "training", "run", "inference")
CORE += (
    "console",
    "data_config",
    "errors",
    "files",
    "faults",
    "model_config",
    "names",
    "runtime",
    "section",
)
# Whoever adds a capability may raise a budget, and says by how much and for what.
BUDGETS = {"core": 10_540, "planning": 880, "llm": 20_880}
LARGEST_FILE = 400
LARGEST_FUNCTION = 60

IGNORED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(source: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that hold code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        line
        for token in tokens
        if token.type not in IGNORED
        for line in range(token.start[0], token.end[0] + 1)
    }
    return lines - docstring_lines(tree)


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def room_of(path: Path) -> str:
    """The folder under llm/, or the name of a file that lies there."""
    return path.parts[1].removesuffix(".py")


def main() -> int:
    sizes: dict[Path, int] = {}
    functions: list[tuple[int, str]] = []
    for path in sorted(Path("llm").rglob("*.py")):
        source = path.read_text()
        tree = ast.parse(source)
        code = lines_of_code(source, tree)
        sizes[path] = len(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = len(code & set(range(node.lineno, node.end_lineno + 1)))
                functions.append((length, f"{path}:{node.lineno} {node.name}"))

    rooms: dict[str, int] = {}
    for path, size in sizes.items():
        rooms[room_of(path)] = rooms.get(room_of(path), 0) + size
    totals = {
        "core": sum(rooms.get(room, 0) for room in CORE),
        "planning": rooms.get("planning", 0),
        "llm": sum(rooms.values()),
    }

    for room, size in sorted(rooms.items(), key=lambda item: -item[1]):
        print(f"{size:7,}  {'core      ' if room in CORE else 'workshop  '}{room}")
    if "--files" in sys.argv:
        for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
            print(f"{size:7,}  {path}")
    for name, budget in BUDGETS.items():
        print(f"{name}: {totals[name]:,} lines of code, at most {budget:,}")
    large_files = [(size, str(path)) for path, size in sizes.items() if size > LARGEST_FILE]
    large_functions = [item for item in functions if item[0] > LARGEST_FUNCTION]
    print(f"largest file: {max(sizes.values())}, at most {LARGEST_FILE}")
    print(f"largest function: {max(functions)[0]}, at most {LARGEST_FUNCTION}")

    problems = [
        f"{name} has {totals[name]:,} lines of code, {totals[name] - budget:,} above its budget"
        for name, budget in BUDGETS.items()
        if totals[name] > budget
    ]
    problems += [f"{where} has {size} lines of code" for size, where in large_files]
    problems += [f"{where} has {size} lines of code" for size, where in large_functions]
    for problem in problems:
        print(f"too large: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
