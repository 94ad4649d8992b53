# `make demo` and `make test` need Python 3.11+ with venv, and make. They share one environment in
# .venv, to which the tests add what only they need; it is made anew when what it is made from
# changes. uv installs faster than pip, which is used where uv is missing or finds no index.
PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: demo test test-all lint audit types docs unit smoke slow gpu clean

demo: $(INSTALLED)
	$(BIN)/clipft demo

# The short checks side by side, then the tests, which keep all cores busy
test: $(INSTALLED_DEV)
	$(MAKE) -j2 types smoke lint audit
	$(MAKE) unit

test-all: test slow

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Known vulnerabilities in the exact versions; needs a network, and says where there is none
audit: $(INSTALLED_DEV)
	$(BIN)/python tests/audit.py

types: $(INSTALLED_DEV)
	$(BIN)/mypy

# The pages, in build/site; a dead link or anchor is an error, which a test of `unit` finds too
docs: $(INSTALLED_DEV)
	$(BIN)/python -m zensical build --strict

# Each process takes a row of neighbors, which share what was trained for them
unit: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The whole way of a user in small: render, train, resume, evaluate
smoke: $(INSTALLED_DEV)
	rm -rf build/smoke
	$(BIN)/clipft demo --render-only --pairs 300 --output-dir build/smoke
	$(BIN)/clipft train --mini-train --model tiny --data-dir build/smoke/data --output-dir build/smoke/runs
	$(BIN)/clipft evaluate build/smoke/runs/dual_lora --data-dir build/smoke/data

slow: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m slow -n auto --maxprocesses 8 --dist worksteal

gpu: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m gpu

install_with_uv = $(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable $(1)
install_with_pip = $(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable $(1)
install = $(if $(UV),$(install_with_uv) ||) { $(install_with_pip); }

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,.)
	touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt
	$(call install,".[dev]")
	touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) build dist *.egg-info
