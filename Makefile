# make demo | test | test-slow | lint | static | reproduce | reproduce-pretrained      everything is installed into .venv, once
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A new version pin or a new top-level package asks for a fresh install.
PROJECT := pyproject.toml constraints.txt $(wildcard */__init__.py)

.PHONY: demo test test-slow lint static reproduce reproduce-pretrained clean

demo: $(VENV)/.torch
	$(BIN)/twingrad demo

# Each core has a worker of its own, which a second thread of its matrix products would only disturb.
test: $(VENV)/.dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal

# Minutes each, alone: some measure memory.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

static: $(VENV)/.dev
	$(BIN)/python -m bench static --against bench/results/static.json

reproduce: $(VENV)/.dev
	$(BIN)/python -m tests.figures

# OpenAI's GPT-2, 124M and 355M, is downloaded once (2 GB).
reproduce-pretrained: $(VENV)/.dev
	$(BIN)/python -m tests.figures --pretrained

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"error: twingrad needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(PROJECT) | $(BIN)/python
	$(INSTALL) --editable '.[torch]'
	touch $@

$(VENV)/.dev: $(PROJECT) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.torch
