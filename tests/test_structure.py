"""Imports go downwards only, lines and flags stay few.    pytest tests/test_structure.py"""

import ast
import dataclasses
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
OPTIONAL = {"pyarrow", "matplotlib", "tiny", "transformers", "trl"}  # imported where they are used
SOURCES = sorted(ROOT.glob("*.py"))


def imported(node):
    """The modules that an import statement names, without what follows their first point."""
    is_from = isinstance(node, ast.ImportFrom)
    names = [node.module or ""] if is_from else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def imports(path):
    """-> (modules that are imported on top, modules that are imported inside functions)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    every = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    parts = ([node for node in every if (id(node) in inside) == kind] for kind in (False, True))
    return [set().union(*map(imported, part)) for part in parts]


def test_every_file_has_a_floor():
    assert {path.stem for path in SOURCES} == set(FLOOR)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_go_downwards(path):
    on_top, inside = imports(path)
    above = {name for name in on_top if FLOOR.get(name, -1) >= FLOOR[path.stem]}
    assert not above, f"{path.name} imports {above}"
    assert inside <= OPTIONAL, f"{path.name} imports {inside - OPTIONAL} inside a function"


@pytest.mark.parametrize("path", [*SOURCES, *ROOT.glob("t*/*.py")], ids=lambda path: path.name)
def test_lines_have_at_most_100_columns(path):
    text = path.read_text(encoding="utf-8")
    lines = [] if "ruff: noqa: E501" in text else text.splitlines()  # tables of programs
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("args, most", [(grpo.Args, 40), (train_rm.Args, 32)])
def test_command_lines_stay_short(args, most):
    assert len(dataclasses.fields(args)) <= most
