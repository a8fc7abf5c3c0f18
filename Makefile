# Each target sets up what it needs. PYTHON chooses the interpreter; PIP_FLAGS is handed to pip; JOBS is how many steps
# of the demo or of a study run at the same time; FLAGS is handed to the program that a target runs. SHORT=1 does what a
# target does on tiny parts: `make smoke` runs all of them so, in a folder of its own.
PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2
STUDY ?= experiments/study/digits.yaml
BRIEF := $(if $(SHORT),--short)
BIN := .venv/bin
INSTALLED := .venv/.installed
# What is done is reused, and what was interrupted resumes. Digests in the names of files decide what is done.
WORKFLOW := OMP_NUM_THREADS=1 $(BIN)/snakemake --cores $(JOBS) --nolock --rerun-incomplete --rerun-triggers mtime \
	--scheduler greedy --quiet host reason $(if $(SHORT),--config overlay=experiments/debug.yaml) --snakefile
# The table compares what is done, whatever has failed.
COMPARED = $(WORKFLOW) experiments/study/Snakefile --configfile $(STUDY) --keep-going $(FLAGS); status=$$?; \
	$(BIN)/python experiments/study/table.py $(STUDY) && $(BIN)/python experiments/study/evidence.py $(STUDY) && exit $$status
LAYERS = OMP_NUM_THREADS=1 $(BIN)/python experiments/study/layers.py $(STUDY) $(BRIEF)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-once test lint types docs format check smoke study study-choices study-cifar10 study-layers \
	study-layers-photos study-photos bench gpu bench-data torture parity full-size viz-digits notebooks dist matrix clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv with everything in it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## the whole job on handwritten digits; FRESH=1 starts over, in an empty folder
	$(if $(FRESH),$(if $(wildcard runs/demo),mv runs/demo runs/demo-$$(date +%Y%m%d-%H%M%S)))
	$(WORKFLOW) experiments/digits/Snakefile $(FLAGS)

demo-once: install # what other targets read; FLAGS are theirs
	$(WORKFLOW) experiments/digits/Snakefile

smoke: install  ## every YAML and every target in its short form, as one table
	PYTHONPATH=experiments:tests OMP_NUM_THREADS=1 $(BIN)/python -m smoke $(FLAGS)

test: install  ## the tests; COVERAGE=1 measures what of src they run. Those of pages want a Chromium
	$(BIN)/pytest --numprocesses 2 --dist loadfile \
		$(if $(COVERAGE),--cov --cov-report term:skip-covered --cov-fail-under 90)

lint: install  ## style and mistakes
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install  ## static types
	$(BIN)/mypy

docs: install  ## check the prose of README and docs, and build the site into runs/docs
	$(BIN)/codespell
	PYTHONPATH=tests $(BIN)/python -m prose
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: install  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: lint types docs test  ## style, types, docs and tests

study: demo-once  ## what each choice of training and sampling is worth, on digits: at most 90 minutes
	$(COMPARED)

study-cifar10: STUDY = experiments/study/cifar10.yaml
study-cifar10: install  ## what the map of a classifier of CIFAR-10 keeps, beside all baselines, in data/cifar10: hours
	$(COMPARED)

study-choices: STUDY = experiments/study/choices.yaml
study-choices: install  ## what each choice is worth on CIFAR-10, after study-cifar10
	$(COMPARED)

study-layers: STUDY = experiments/study/layers.yaml
study-layers: demo-once  ## what each layer of a classifier keeps, on digits
	$(COMPARED)
	$(LAYERS)

study-layers-photos: STUDY = experiments/study/layers-photos.yaml
study-layers-photos: install  ## the same of EfficientNet-Lite0 on 64 px photos, after study-photos
	$(COMPARED)
	$(LAYERS)

study-photos: STUDY = experiments/study/photos.yaml
study-photos: install  ## the inverter of a real classifier on 64 px photos, in data/photos: many hours
	$(COMPARED)

bench: demo-once  ## what training, sampling and starting cost, side by side with the authors' way: three quarters of an hour
	PYTHONPATH=experiments:tests OMP_NUM_THREADS=1 $(BIN)/python -m bench $(BRIEF) $(FLAGS)

gpu: install  ## what a CUDA machine makes of it, in ten minutes: tests, recipes, speed, memory; SHORT=1 on any machine
	PYTHONPATH=experiments:tests $(BIN)/python -m bench.gpu $(BRIEF) $(FLAGS)

bench-data: install  ## how fast shards are written and read on this machine, as ratios
	PYTHONPATH=experiments:tests OMP_NUM_THREADS=1 $(BIN)/python -m bench.shards $(BRIEF) $(FLAGS)

torture: install  ## kills, ranks that die, full disks and spoilt files, as one table, and slow tests: 20 minutes
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m torture $(BRIEF) $(FLAGS)
	$(if $(SHORT),,OMP_NUM_THREADS=1 $(BIN)/pytest -m slow)

parity: install  ## differences from the authors' code, on a small model of theirs
	PYTHONPATH=tests $(BIN)/python -m parity

full-size: install  ## one step of the full-size model for each backbone of the paper: time and memory
	PYTHONPATH=experiments:tests $(BIN)/python -m bench.full_size $(BRIEF)

viz-digits: demo-once  ## whether steering and interpolation do what they claim, on digits
	PYTHONPATH=experiments OMP_NUM_THREADS=1 $(BIN)/python -m bench.viz_digits $(BRIEF)

notebooks: demo-once  ## run the tours in experiments/*.ipynb again, and keep what they show; SHORT=1 only runs them
	OMP_NUM_THREADS=1 $(BIN)/python experiments/notebooks.py $(BRIEF)

dist: install  ## build wheel and sdist, install the wheel into an empty environment (SHORT=1: on .venv's libraries) and try it
	PYTHONPATH=tests $(BIN)/python -m installs dist --pip="$(PIP_FLAGS)" $(BRIEF) $(FLAGS)

matrix: install  ## the wheel on Python 3.11 to 3.13 with the newest and oldest libraries; 20 GB; SHORT=1 only resolves them
	PYTHONPATH=tests $(BIN)/python -m installs matrix $(BRIEF) $(FLAGS)

clean:  ## remove what runs and tests leave, but not .venv
	rm -rf runs .snakemake .coverage* .mypy_cache .pytest_cache .ruff_cache
