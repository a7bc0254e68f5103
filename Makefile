# `make demo` and `make test` set everything up on a machine with python3, make and git.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all test-faults bench lint types check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.x"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/simmim experiment label-efficiency recipes/demo.yaml --precision fp32

# One thread per worker. Tests of one file stay in one worker, which shares the models that their fixtures train.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(READY)
	$(PYTEST)

test-all: test
	$(PYTEST) -m "slow and not faults"

test-faults: $(READY)
	$(BIN)/python -m pytest -q -m faults

bench: $(READY)
	$(BIN)/python tools/benchmark.py step

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
