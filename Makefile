# make demo    a private Python, cloche, and a first network, trained and explained
# make test    everything that a change has to pass, on two cores in minutes
# make help    all of them

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
DATA ?= ../shared/data

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-slow test-faults test-faults-long test-gpu recipes bench bench-primer bench-frameworks bench-families bench-loop bench-fast bench-diffusion words clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(BIN)/python:
	@t=$$(date +%s); $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cloche needs Python 3.11 or newer; make PYTHON=python3.11 takes another")' && \
	$(PYTHON) -m venv $(VENV) && echo "[1/3] a private Python in $(VENV)   $$(($$(date +%s) - t)) s"

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@t=$$(date +%s); $(BIN)/python -m pip install --quiet --disable-pip-version-check -e . && \
	echo "[2/3] cloche and PyTorch for this machine   $$(($$(date +%s) - t)) s" && touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" && touch $@

demo: $(VENV)/.installed  ## install, then: cloche train digits
	@echo "[3/3] cloche train digits"
	@$(BIN)/cloche train digits

test: $(VENV)/.dev  ## the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not faults"

test-slow: $(VENV)/.dev  ## the tests that take long
	$(BIN)/python -m pytest -m "slow and not gpu and not faults"

test-faults: $(VENV)/.dev  ## kills, faults of the disk, power cuts, at every place
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "faults and not slow and not gpu"

test-faults-long: $(VENV)/.dev  ## a hundred kills, and where they landed
	$(BIN)/python -m pytest -s -m "faults and slow"

test-gpu: $(VENV)/.dev  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .

recipes: $(VENV)/.dev  ## every shipped recipe against its [expect]
	$(BIN)/python benchmarks/recipes.py --data $(DATA)

bench-primer: $(VENV)/.dev  ## the primer's job: cloche beside the script
	$(BIN)/python benchmarks/primer.py --data $(DATA)/mnist

bench-frameworks: $(VENV)/.dev  ## the same job: cloche beside Keras, Lightning and transformers.Trainer
	$(BIN)/python benchmarks/frameworks.py --data $(DATA)/mnist

bench-families: $(VENV)/.dev  ## the other families: cloche beside the best-known programs
	$(BIN)/python benchmarks/families.py --data $(DATA) $(if $(EXAMPLES),--examples $(EXAMPLES)) $(if $(NANOGPT),--nanogpt $(NANOGPT))

bench-loop: $(VENV)/.dev  ## what the loop and its checkpoints cost
	$(BIN)/python benchmarks/loop.py --data $(DATA)/mnist

bench-fast: $(VENV)/.dev  ## how soon mnist-fast is as good as the script's five epochs
	$(BIN)/python benchmarks/fast.py --data $(DATA)/mnist

bench: bench-primer bench-frameworks bench-families bench-loop bench-fast  ## all of them, one after the other: leave the machine alone

bench-diffusion: $(VENV)/.dev  ## what the drawn digits of runs/digits-diffusion are worth
	$(BIN)/python benchmarks/diffusion.py runs/digits-diffusion --out .bench/diffusion

words: $(VENV)/.dev  ## extract the messages, update and compile the catalogues
	$(BIN)/python lang/words.py

clean:  ## what was made here, runs left alone
	rm -rf $(VENV) .bench build dist *.egg-info .pytest_cache .ruff_cache
