# Every target sets up .venv by itself. ARGS passes options on, e.g. make quickstart ARGS="--run.name second"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install quickstart test test-all gpu lint format benchmark tensorboard clean

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

# All that needs a GPU, with the Python whose CUDA build of torch is installed (no .venv): the
# checks, side by side where pytest-xdist is there, then the benchmarks of attention and of a whole
# training step. OUT is where results go.
OUT ?= runs/gpu
GPU_TESTS := tests/attention/triton tests/recipes/test_benchmark_cuda.py \
	tests/recipes/test_benchmark_step.py tests/training/test_activations.py \
	tests/training/test_compilation.py tests/training/test_liger.py
gpu:
	mkdir -p $(OUT)
	status=0; \
	$(PYTHON) -m pytest -m gpu -p no:cacheprovider $(GPU_TESTS) \
		$$($(PYTHON) -c "import xdist" 2> /dev/null && echo "-n 12") $(ARGS) || status=1; \
	$(PYTHON) -m lit_sparse benchmark --device cuda --seconds 200 \
		--json $(OUT)/benchmark.json --plot $(OUT)/benchmark.png || status=1; \
	$(PYTHON) -m lit_sparse benchmark --what step --device cuda --seconds 100 \
		--json $(OUT)/step.json || status=1; \
	exit $$status

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
