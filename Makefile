# Every target makes or reuses the environment it needs. Needed: Python >= 3.11 with pip, and make.
#   make test PYTHON=python3.13      the same with another interpreter, in an environment of its own
#   make test ARGS='-k jit'          with arguments for pytest
usable := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13; do $$p -c '$(usable)' 2>/dev/null && echo $$p && break; done)
endif
VERSION := $(shell $(PYTHON) -c '$(usable)' && $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error Python >= 3.11 is needed; name one with PYTHON=...)
endif

# Python 3.11 has an environment and a lock of its own, as no JAX after 0.10 installs there; all newer ones share a lock.
VENV := .venv$(if $(filter-out 3.11,$(VERSION)),-$(VERSION))
LOCK := constraints/py$(if $(filter-out 3.11,$(VERSION)),313,311).txt
BIN := $(VENV)/bin
PEERS := $(VENV)-peers
STAMPS := $(addprefix $(VENV)/.,demo test check) $(PEERS)/.peers

.PHONY: help setup demo minutes test test-all soak planted test-jax check measure format bench bench-peers docs lock clean
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# The stamp .EXTRA in an environment says that the package is installed there with that extra.
$(STAMPS): pyproject.toml $(LOCK)
	@[ -x $(@D)/bin/pip ] || $(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet -c $(LOCK) -e '.[$(patsubst .%,%,$(@F))]'
	@touch $@

setup: $(VENV)/.check  ## everything but the peers

demo: $(VENV)/.demo  ## train a classifier on handwritten digits
	$(BIN)/python examples/digits.py

# Compiled code is kept between runs. `test-all` runs what `test` leaves out, and nothing twice.
test test-all: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
test test-all: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test test-all: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES := -1
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 --ignore=tests/test_formalities.py
minutes:
	@echo 'make test takes about four minutes on two cores, and eight the first time: it makes its environment and compiles.'
test: minutes $(VENV)/.test  ## formalities first, then the tests, docstrings and documents, without the long ones
	$(BIN)/python -m pytest -q tests/test_formalities.py
	$(PYTEST) -m 'not long' $(ARGS)

test-all: $(VENV)/.test  ## the long tests after it: thousands of random programs, all cells of the tables
	@echo 'make test-all takes about eight minutes on two cores.'
	$(PYTEST) -m long $(ARGS)

SECONDS := 120
soak: $(VENV)/.test  ## interrupts, signals, threads and donation for two minutes, or SECONDS=...
	PYTHONPATH=tests $(BIN)/python tests/soak.py $(SECONDS)

planted: $(VENV)/.test  ## wrong gradients for check_grads, 200 seeds of each size and loss: hours
	PYTHONPATH=tests $(BIN)/python tests/planted.py $(ARGS)

test-jax: $(VENV)/.test  ## JAX's own tests on our transforms; JAX_REPO=... is a git directory of its repository
	$(BIN)/python tests/jax_suite.py $(or $(JAX_REPO),$(error JAX_REPO=... is missing)) $(ARGS)

check: $(VENV)/.check  ## format, lint, types, formalities
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/mypy --python-executable $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_formalities.py

measure: $(VENV)/.test  ## the house in numbers; ARGS='before/src src' for columns to compare
	PYTHONPATH=tests $(BIN)/python tests/measure.py $(ARGS)

format: $(VENV)/.check  ## mend what `check` says of format and lint, code blocks of documents included
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

BENCHMARKS := ratios transforms derivatives per_example sparse prepare trust
bench: $(VENV)/.demo  ## what we cost, as a ratio to pure JAX; about eight minutes
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-peers: $(PEERS)/.peers  ## the same step in Flax NNX and Equinox, in an environment of its own
	$(PEERS)/bin/python benchmarks/peers.py $(ARGS)

docs: $(VENV)/.test  ## write docs/api.md, the types of the samplers and the pictures, and execute every block of README.md and docs/
	$(BIN)/python docs/_api.py
	$(BIN)/python docs/_stubs.py
	$(BIN)/python docs/_pictures.py
	$(BIN)/python -m pytest -q README.md docs

lock: unlocked := $(VENV)-lock
lock:  ## resolve afresh and pin; once with PYTHON=python3.11, once with PYTHON=python3.13
	$(PYTHON) -m venv --clear $(unlocked)
	$(unlocked)/bin/pip install --quiet -e '.[check,peers]'
	$(unlocked)/bin/pip check
	(echo '# Python $(VERSION), written by `make lock`'; $(unlocked)/bin/pip freeze --exclude-editable) > $(LOCK)
	rm -r $(unlocked)

clean:  ## remove environments and caches
	rm -rf .venv* .cache .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -r {} +
