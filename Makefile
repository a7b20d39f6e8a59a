# Each target only calls what can be called by hand; `make demo PYTHON=python3.12` picks another Python.
PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist worksteal

.PHONY: demo test faults lint bench

demo: .venv/run.stamp
	.venv/bin/python -m utils.demo demo
	.venv/bin/python main.py demo/config.yml
	.venv/bin/python -m utils.demo demo --report

test: .venv/dev.stamp
	$(PYTEST)

faults: .venv/dev.stamp
	DINOV3SEG_FAULTS=whole $(PYTEST) -o faulthandler_timeout=7200 tests/faults

lint: .venv/dev.stamp
	.venv/bin/ruff check .

bench: .venv/run.stamp
	.venv/bin/python -m benchmarks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp | .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements-dev.txt
	touch $@
