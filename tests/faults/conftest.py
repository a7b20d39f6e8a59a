"""The table of figures that ends `make faults`."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from size import WHOLE


def pytest_configure() -> None:
    if WHOLE and "DINOV3SEG_FAULTS_TABLE" not in os.environ:
        descriptor, os.environ["DINOV3SEG_FAULTS_TABLE"] = tempfile.mkstemp(suffix=".jsonl")
        os.close(descriptor)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table = os.environ.get("DINOV3SEG_FAULTS_TABLE")
    if not table or not Path(table).exists():
        return
    rows = [json.loads(line) for line in Path(table).read_text(encoding="utf-8").splitlines()]
    width = max((len(name) for name, _ in rows), default=0)
    terminalreporter.section("figures")
    for name, text in rows:
        terminalreporter.write_line(f"{name:<{width}} | {text}")
