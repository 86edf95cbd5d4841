# Every target makes its own environment, .venv, from nothing but python3 (3.10 or later) and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
NATIVE := $(wildcard csrc/*.cpp csrc/*/*) tools/native_build.py

.PHONY: help test sanitize demo bench docs resources wheels oldest newest lint types clean

help:
	@echo "make test    the test suite"
	@echo "make sanitize    the tests of the CPU kernels, and of the CUDA kernels on a CPU, again under AddressSanitizer and UBSan"
	@echo "make demo    train an encoder on real digits, with the plain loss and with the fused one; writes train_digits.png"
	@echo "make bench   time and memory beside plain PyTorch, torch.compile and other libraries, and a report of it in build/bench, 10 minutes"
	@echo "make docs    the documentation, as pages that open from a folder: build/docs/index.html"
	@echo "make resources    every kernel on four GPUs: registers, shared memory, instructions of its far loop; of Triton the newest version"
	@echo "                  and the oldest; compiles what has changed. RESOURCES=--update writes their tables"
	@echo "make wheels  a pure wheel, and a native one for the CUDA toolkit that is found, each tested in an environment of its own"
	@echo "make oldest  the package on the oldest versions that it runs on, built from source there and tested;  make newest    the newest"
	@echo "make lint    ruff, lint and format;  make types    mypy;  make clean    remove what make made"

# What the native extension is built with comes first, for only a build without isolation finds it.
$(READY): pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch ninja 'setuptools>=77'
	$(BIN)/python tools/native_build.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,bench,demo,dev,docs,recipes,wheels]'
	touch $@

# A process a core, with one thread, for matrices of tests are small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical

# A file stays in one process, and so do its fixtures.
test: $(READY)
	$(PYTEST) --dist loadfile

# The interpreter is not instrumented: the runtimes of the sanitizers come in first, and leaks, all of them its own, are not asked for.
BUILD := $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
RUNTIMES := $(foreach library,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(library)))

SANITIZED := LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 CLOP_HOST_SANITIZE=address,undefined \
	$(PYTEST)

sanitize: $(READY)
	$(SANITIZED) tests/host
	CLOP_CUDA=0 CLOP_NATIVE=1 CLOP_SANITIZE=address,undefined $(BUILD)
	$(SANITIZED) tests/cpu tests/contract \
		-k "(cpu or native) and not memory_that and not does_not_load"; \
		status=$$?; $(BUILD); exit $$status

demo: $(READY)
	$(BIN)/python examples/train_digits.py

# PRESET=readme BENCH=benchmarks/results/cpu makes the results that the README shows: half an hour on two cores.
PRESET ?= quick
BENCH ?= build/bench

bench: $(READY)
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks.compare --preset $(PRESET) --output $(BENCH) --report

# What the builder says of its own next version is nothing about these pages.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# RESOURCES=--update writes the tables of both versions of Triton.
resources: $(READY)
	$(BIN)/python -m benchmarks.resources_cuda
	$(BIN)/python -m benchmarks.resources $(RESOURCES)
	tools/test_versions.sh kernels $(RESOURCES)

wheels: $(READY)
	$(BIN)/python tools/build_wheels.py

oldest newest:
	PYTHON=$(PYTHON) tools/test_versions.sh $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info clop_kernels/_native.abi3.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks train_digits.png learning_rate_bound.* collapse
