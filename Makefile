# Every target sets up .venv by itself. ARGS passes options on, e.g. make quickstart ARGS="--run.name second"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install quickstart test test-all lint format benchmark tensorboard clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

quickstart: install
	$(BIN)/lit-sparse fit --config quickstart $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

test-all: install
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: install
	$(BIN)/lit-sparse benchmark $(ARGS)

tensorboard: install
	$(BIN)/tensorboard --logdir runs $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
