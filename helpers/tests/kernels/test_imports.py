"""Kernels import PyTorch, the standard library and one another, and nothing of the book."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).resolve().parents[2]


def test_kernels_do_without_the_book():
    files = [*HELPERS.glob("*.py"), *HELPERS.glob("remat/*.py")]
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:  # one another
                parts = (node.module or "").split(".") + [alias.name for alias in node.names]
                assert not {"book", "tests"} & set(parts), file.name
                continue
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, (file.name, name)


def test_the_folder_may_have_another_name(tmp_path):
    left = shutil.ignore_patterns("book", "tests", "__pycache__")
    shutil.copytree(HELPERS, tmp_path / "less_memory", ignore=left)
    code = """
import sys, torch
from less_memory import FusedConvBN2d, compare, predict_memory, remat
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), FusedConvBN2d(4, 4, 3))
assert compare(model, torch.randn(2, 3, 8, 8)).equal and predict_memory(model, (2, 3, 8, 8), max_cost=9).peak
assert "helpers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
