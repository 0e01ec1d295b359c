"""Names and phrases that readers of the field stumble over: an aid for `make check`, described in CONTRIBUTING.md.

Usage: python .ci/words.py FOLDER_OR_FILE...
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

DIALECT = {
    "told",
    "tell",
    "tells",
    "kept",
    "standing",
    "unfinished",
    "heard",
    "strangers",
    "stranger",
    "begun",
    "beside",
}
OPENINGS = ("What", "The same", "How", "Where", "Whether", "Which")
UNITS = "example|document|row|token|step|expert|task|layer|block|linear|head|channel|column|batch|file|line|setting"
PER = re.compile(
    rf"\b(?:once|twice|one|\d+ \w+|(?:tokens|numbers|bytes|seconds|rows|nats|scales|entries)) an? (?:{UNITS})\b"
)
SKIPPED = {"skills"}  # texts of tasks, not of the project


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of everything that the code gives a name to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def faults(path: Path) -> Iterator[str]:
    """Yield a line for every name or phrase of a file that is not in the field's words."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for line, name in names(tree):
        words = name.lower().strip("_").split("_")
        if name == "one" or (DIALECT.intersection(words) and not name.startswith("test_")):
            yield f"{path}:{line}: name {name!r}: take the field's word, such as the singular of what it is in"
    for line, text in docstrings(tree):
        first = text.split("\n")[0]
        if first.startswith(tuple(f"{opening} " for opening in OPENINGS)):
            yield f"{path}:{line}: docstring {first[:40]!r}: begin with a verb, or with a noun for a class"
        for phrase in PER.findall(text):
            yield f"{path}:{line}: {phrase!r}: write 'per'"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            for phrase in PER.findall(token.string):
                yield f"{path}:{token.start[0]}: {phrase!r}: write 'per'"


def main() -> int:
    """Print all faults of the files that are named; 1 when there are any."""
    paths = [
        file for name in sys.argv[1:] for file in ([Path(name)] if Path(name).is_file() else Path(name).rglob("*.py"))
    ]
    found = [fault for path in sorted(paths) if not SKIPPED.intersection(path.parts) for fault in faults(path)]
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
