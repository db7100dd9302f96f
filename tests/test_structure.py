"""Imports go downwards only, lines and flags stay few, examples are true.

pytest tests/test_structure.py
"""

import ast
import dataclasses
import doctest
import importlib
from pathlib import Path

import pytest

import grpo
import train_rm

ROOT = Path(__file__).parents[1]
ORDER = [
    ["common", "testcode"],
    ["confined"],
    ["sandbox", "extract", "runs", "hub"],
    ["problems", "codescaler"],
    ["pairs"],
    ["metrics"],
    ["train_rm", "grpo"],
    ["bench"],
]
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
# Imported where they are used, or on top where the system has them.
OPTIONAL = {"pyarrow", "matplotlib", "tiny", "transformers", "trl", "fcntl", "resource"}
SOURCES = sorted(ROOT.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_go_downwards(path):
    above = {name for name, floor in FLOOR.items() if floor >= FLOOR[path.stem]}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            is_from = isinstance(node, ast.ImportFrom)
            names = [node.module] if is_from else [alias.name for alias in node.names]
            names = {name.partition(".")[0] for name in names}
            assert not names & above, f"{path.name} imports {names & above}"
            assert node.col_offset == 0 or names <= OPTIONAL, f"{names} inside a function"


@pytest.mark.parametrize("path", [*SOURCES, *ROOT.glob("t*/*.py")], ids=lambda path: path.name)
def test_lines_have_at_most_100_columns(path):
    text = path.read_text(encoding="utf-8")
    lines = [] if "ruff: noqa: E501" in text else text.splitlines()  # tables of programs
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("name", FLOOR)
def test_examples_of_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("args, most", [(grpo.Args, 40), (train_rm.Args, 32)])
def test_command_lines_stay_short(args, most):
    assert len(dataclasses.fields(args)) <= most
