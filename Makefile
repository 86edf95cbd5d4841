# Every target makes its own environment, .venv, from nothing but python3 (3.10 or later) and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
NATIVE := $(wildcard csrc/*.cpp csrc/*/*) tools/native_build.py

.PHONY: help test demo bench resources wheels lint types clean

help:
	@echo "make test    the test suite"
	@echo "make demo    train an encoder on real digits, with the plain loss and with the fused one; writes train_digits.png"
	@echo "make bench   time and memory beside the plain loss and torch.compile of it"
	@echo "make resources    compile every Triton kernel for four GPUs: registers, shared memory, matrix instructions; 10 minutes"
	@echo "make wheels  a pure wheel, and a native one for the CUDA toolkit that is found, each tested in an environment of its own"
	@echo "make lint    ruff, lint and format;  make types    mypy;  make clean    remove what make made"

# What the native extension is built with comes first, for only a build without isolation finds it.
$(READY): pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch ninja 'setuptools>=77'
	$(BIN)/python tools/native_build.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,bench,demo,dev,wheels]'
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

wheels: $(READY)
	$(BIN)/python tools/build_wheels.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info clop_kernels/_native.abi3.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks train_digits.png
