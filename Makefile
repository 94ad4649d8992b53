# `make demo` and `make test` need Python 3.11+ with venv, and make. They share one
# environment in .venv, made once and made anew when what it is made from changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint audit types docs unit smoke slow gpu clean

demo: $(STAMP)
	$(BIN)/clipft demo

test: $(STAMP) lint types audit docs unit smoke

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Known vulnerabilities in the exact versions; needs a network, and says where there is none
audit: $(STAMP)
	$(BIN)/python tests/audit.py

types: $(STAMP)
	$(BIN)/mypy

# The pages, in build/site; a dead link or anchor is an error
docs: $(STAMP)
	$(BIN)/python -m zensical build --strict

# A file's tests stay together, as they share what was trained for them
unit: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# The whole way of a user in small: render, train, resume, evaluate
smoke: $(STAMP)
	rm -rf build/smoke
	$(BIN)/clipft demo --render-only --pairs 300 --output-dir build/smoke
	$(BIN)/clipft train --mini-train --model tiny --data-dir build/smoke/data --output-dir build/smoke/runs
	$(BIN)/clipft evaluate build/smoke/runs/dual_lora --data-dir build/smoke/data

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
