# Two commands set everything up: `make train` (the main job) and `make test`.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN = $(VENV)/bin
PINS = $(shell $(PYTHON) -c 'import sys; print("requirements/python3.11.txt" if sys.version_info < (3, 12) else "requirements/python3.12.txt")')
STAMP = $(VENV)/.installed-$(EXTRAS)

.PHONY: help install train test test-fast drill lint colabs parity-env parity clean

help:
	@echo "make train    install, train QSFormer and ProtoNet on glyphs, compare them (minutes on two cores)"
	@echo "make test     install, run the whole test suite"
	@echo "make test-fast  the same without the slow tests"
	@echo "make drill    break runs in every way that machines do, and check that nothing is lost (40 minutes)"
	@echo "make lint     ruff and pyright"
	@echo "make colabs   run the notebooks from top to bottom"
	@echo "make parity   compare with torch, in an environment of its own (make parity-env)"

install: $(STAMP)

$(STAMP): pyproject.toml requirements/python3.11.txt requirements/python3.12.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(PINS) --editable '.[$(EXTRAS)]'
	touch $@

# glibc gives large freed blocks back to the kernel, and every step faults them in again: keep them instead.
train: export MALLOC_ARENA_MAX = 1
train: export MALLOC_MMAP_MAX_ = 0
train: export MALLOC_TRIM_THRESHOLD_ = 17179869184
train: install
	$(BIN)/xattn train --config=protonet/glyphs --workdir=runs/protonet_glyphs
	$(BIN)/xattn train --config=qsformer/glyphs --workdir=runs/qsformer_glyphs
	$(BIN)/xattn eval --workdir=runs/qsformer_glyphs --against=runs/protonet_glyphs

test: install
	$(BIN)/pytest -n 2 --dist worksteal -q

test-fast: install
	$(BIN)/pytest -n 2 --dist worksteal -q -m 'not slow and not parity'

drill: install
	$(BIN)/python -m tests.distributed.drill

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

colabs: install
	JAX_PLATFORMS=cpu $(BIN)/python colabs/check.py

parity-env:
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet --requirement requirements/parity.txt
	.venv-parity/bin/pip install --quiet --no-deps --requirement requirements/parity-no-deps.txt
	.venv-parity/bin/pip install --quiet --constraint $(PINS) --editable '.[dev]'

parity: parity-env
	.venv-parity/bin/pytest -q -m parity tests/parity

clean:
	rm -rf runs .pytest_cache .ruff_cache
