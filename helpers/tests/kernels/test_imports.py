"""Kernels import PyTorch, the standard library and one another, and nothing of the book."""

import ast
import sys
from pathlib import Path

HELPERS = Path(__file__).resolve().parents[2]


def test_kernels_do_without_the_book():
    files = [*HELPERS.glob("*.py"), *HELPERS.glob("remat/*.py")]
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in {"torch", "triton", "helpers", *sys.stdlib_module_names}, name
                assert not name.startswith(("helpers.book", "helpers.tests")), f"{file.name} imports {name}"
