# `make` alone prints what there is. Everything runs inside .venv, which is built on first use.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  ?= torch==2.13.0
UV     ?= uv==0.13.9
JOBS   ?= 2
FOR    ?= 10m

# One thread per process: the tests run $(JOBS) processes, and exact sums need a fixed order.
TESTENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST  := $(TESTENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q
LONG    := slow or families or faults or soak
FAST     = $(PYTEST) --timeout 120 -m "not ($(LONG))" --durations 10 --durations-min 5
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test coverage test-slow test-families faults soak fuzz check format bench bench-memory \
  bench-methods bench-network bench-protocol bench-related bench-speed docs lock wheels-arm clean

help:  ## Print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Create .venv from the lock (done by every target that needs it)

# The lock first, then torch: whatever any build of torch needs is in the lock already, so the
# second step adds torch (and its GPU libraries, where the platform's build has them), no more.
# --no-compile: Python compiles what is imported when it is; all of it ahead costs a minute.
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "No '$(PYTHON)' here. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "FlexP-SFL needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-deps --no-compile --require-hashes -r requirements.lock
	$(PIP) install -q --no-compile "$(TORCH)"
	$(PIP) install -q --no-deps --no-build-isolation -e .
	$(PIP) check
	@touch $@

demo: $(STAMP)  ## A first run: a few clients fine-tune one model together
	$(BIN)/flexp demo

test: $(STAMP)  ## The fast tests
	$(FAST)

# Watching every line makes the tests take half as long again, so it is not a part of `make test`.
coverage: $(STAMP)  ## The fast tests, with the coverage gate
	$(FAST) --cov --cov-report term

test-slow: $(STAMP)  ## The long tests: real models, every family that speaks, more faults
	$(PYTEST) --timeout 900 -m slow

test-families: $(STAMP)  ## Split against whole, for every model family and every cut
	$(PYTEST) --timeout 1800 -m families --result tests/families.json

faults: $(STAMP)  ## Kills and broken connections by the hundred (up to 40 minutes)
	$(PYTEST) --timeout 1800 -m faults --suite faults
	$(BIN)/python benchmarks/tables.py --write

soak: $(STAMP)  ## Clients that come and go for a long time: make soak FOR=20m
	$(TESTENV) $(BIN)/python -m pytest -q --timeout 0 -m soak --suite steps --for $(FOR) tests/faults/test_exactly_once.py
	$(TESTENV) $(BIN)/python -m pytest -q --timeout 0 -m soak --suite soak --for $(FOR) tests/faults/test_soak.py
	$(BIN)/python benchmarks/tables.py --write

check: $(STAMP)  ## Format, lint, types, layers, dependencies, spelling, then `make coverage`
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright -p pyproject.toml --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell
	@$(MAKE) --no-print-directory coverage

format: $(STAMP)  ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-protocol  ## Run the benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/splits.py
	$(BIN)/python benchmarks/partial.py
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/quantized.py

bench-protocol: $(STAMP)  ## Methods against each other, as benchmarks/protocol.yaml lays down
	$(BIN)/python benchmarks/protocol.py quick
	$(BIN)/python benchmarks/protocol.py spam
	$(BIN)/python benchmarks/protocol.py shakespeare

# Each method on one fixed set of rates; a run that was stopped is gone on with.
bench-methods: $(STAMP)  ## Every method on one task, three seeds (an hour on two busy cores)
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/flexp compare recipes/quick.yaml --methods recipes/all.methods.yaml --seeds 0,1,2 \
	  --jobs 2 --json --resume data.clients=4 rounds=4 train.batch=4 train.head_lr=0.01 \
	  train.label_prior=false out=runs/methods > build/methods.json
	mv build/methods.json benchmarks/results/methods.json
	$(BIN)/python benchmarks/tables.py --write

bench-related: $(STAMP)  ## Seven related systems, each by its recipe, one seed (an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/related.py
	$(BIN)/python benchmarks/tables.py --write

bench-network: $(STAMP)  ## Training between processes: what a network adds (12 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/network.py
	$(BIN)/python benchmarks/tables.py --write

bench-speed: $(STAMP)  ## How fast a step is, against the machine and against others (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed/peers.py
	$(BIN)/python benchmarks/speed/rounds.py
	$(BIN)/python benchmarks/tables.py --write

bench-memory: $(STAMP)  ## A client's memory, predicted against measured (15 minutes, 3 GB of disk)
	$(BIN)/python benchmarks/memory.py

fuzz: $(STAMP)  ## Fuzz everything that reads what others send, for FOR=10m in all
	$(PIP) install -q -e ".[fuzz]"
	$(BIN)/python tests/fuzz/run.py --for $(FOR)
	$(BIN)/python benchmarks/tables.py --write

docs: $(STAMP)  ## Build the documentation into build/site
	$(PIP) install -q -e ".[docs]"
	$(BIN)/zensical build --clean

# Resolved for Linux, macOS and Windows at once; see [tool.uv] in pyproject.toml.
lock: build/uv/bin/uv  ## Resolve requirements.lock again (UPGRADE=1 takes the newest versions)
	build/uv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	  --extra data --extra gguf --extra images --extra dev --no-emit-package torch --no-header \
	  $(if $(UPGRADE),--upgrade) --quiet --output-file requirements.lock

wheels-arm: build/uv/bin/uv  ## Does the core install on 64-bit Arm Linux without a compiler?
	$(PYTHON) deploy/arm_wheels.py --uv build/uv/bin/uv --torch "$(firstword $(TORCH))"

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install -q --disable-pip-version-check "$(UV)"

clean:  ## Remove .venv, caches and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
