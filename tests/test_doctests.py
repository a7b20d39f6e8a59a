"""Every module's examples run, and every module with code has some."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    *ROOT.glob("*.py"),
    *sorted((ROOT / "models").glob("*.py")),
    *sorted((ROOT / "utils").glob("*.py")),
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_examples_of_a_module_hold(path):
    outcome = doctest.testmod(importlib.import_module(module_name(path)))
    assert outcome.failed == 0
    tree = ast.parse(path.read_text(encoding="utf-8"))
    has_code = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    assert outcome.attempted > 0 or not has_code, f"{path.name} has code but no example"
