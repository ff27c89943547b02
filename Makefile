# make setup | demo | test | check. Needs Python >= 3.11 and a network with the package registry.
PYTHON ?= python3
BIN := .venv/bin
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: setup demo test check clean

setup: .venv/ready

# Bytecode is compiled once here, so that no later start pays for it.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/finetune demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv
