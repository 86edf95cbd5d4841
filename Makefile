# Every target makes its own environment, .venv, from nothing but python3 (3.10 or later) and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help test demo bench resources lint types clean

help:
	@echo "make test    the test suite"
	@echo "make demo    train an encoder on real digits, with the plain loss and with the fused one; writes train_digits.png"
	@echo "make bench   time and memory beside the plain loss and torch.compile of it"
	@echo "make resources    compile every Triton kernel for four GPUs: registers, shared memory, matrix instructions; 10 minutes"
	@echo "make lint    ruff, lint and format;  make types    mypy;  make clean    remove what make made"

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,bench,demo,dev]'
	touch $@

test: $(READY)
	$(BIN)/python -m pytest

demo: $(READY)
	$(BIN)/python examples/train_digits.py

bench: $(READY)
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks.compare

resources: $(READY)
	$(BIN)/python -m benchmarks.resources

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks train_digits.png
