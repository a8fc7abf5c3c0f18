# Each target sets up what it needs. PYTHON chooses the interpreter; PIP_FLAGS is handed to pip.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types format check bench bench-data torture-data parity full-size viz-digits clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv with everything in it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## the whole job on handwritten digits; FLAGS=--fresh starts over
	$(BIN)/featinv-pl demo $(FLAGS)

test: install  ## the tests, with coverage of src; those of pages want a Chromium (Debian: apt-get install chromium)
	$(BIN)/pytest --numprocesses 2 --cov --cov-report term:skip-covered --cov-fail-under 90

lint: install  ## style and mistakes
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install  ## static types
	$(BIN)/mypy

format: install  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: lint types test  ## all that CI runs

bench: demo  ## where the time of training and sampling goes on this machine
	$(BIN)/featinv-pl fit --config experiments/digits/spatial.yaml --config experiments/bench/profile.yaml

bench-data: install  ## how fast shards are written and read on this machine, as ratios
	OMP_NUM_THREADS=1 $(BIN)/python tests/slow/bench_data.py

torture-data: install  ## kill extraction and streaming, damage shards, and count what is lost: about 20 minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/slow/torture_data.py

parity: install  ## differences from the authors' code, on a small model of theirs
	cd tests && ../$(BIN)/python -m parity

full-size: install  ## one step of the full-size model for each backbone of the paper: time and memory
	cd tests && ../$(BIN)/python -m full_size

viz-digits: demo  ## whether steering and interpolation do what they claim, on digits
	OMP_NUM_THREADS=1 $(BIN)/python tests/slow/viz_digits.py

clean:  ## remove what runs and tests leave, but not .venv
	rm -rf runs .coverage* .mypy_cache .pytest_cache .ruff_cache
