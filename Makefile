# Every target makes its own environment, .venv, and installs what it needs there: python3 (3.11 or newer) and a package registry
# are enough. PYTHON=python3.12 chooses another Python; run `make clean` first if .venv exists already.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*/*) tools/native_build.py

.PHONY: help venv test test-fast sanitize demo bench docs resources wheels oldest newest format lint types clean

help: ## print this list
	@echo "Each target installs what it needs into .venv first; the first use takes minutes, and prints its steps."
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

# ---- the environment: one file in .venv/ready for each group of packages that is installed ------------------------------------

READY := $(VENV)/ready
WITH = $(addprefix $(READY)/,$(1))

# The tools in constraints.txt need Python 3.11; the package itself runs on 3.10. --clear removes what a failed attempt has left.
$(READY)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON=$(PYTHON) is Python %d.%d, but make needs 3.11 or newer." \
		" Install one, or name it: make PYTHON=python3.12 ..." % tuple(sys.version_info[:2]))'
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(READY) && touch $@

$(READY)/package: pyproject.toml setup.py constraints.txt $(NATIVE) tools/environment.py | $(READY)/python
	@$(BIN)/python tools/environment.py package
	@touch $@

# `all` is what the whole test suite needs; it holds every other group.
$(call WITH,all demo dev docs bench wheels): pyproject.toml constraints.txt tools/environment.py | $(READY)/python
	@$(BIN)/python tools/environment.py $(@F)
	@touch $@

# torch comes first, because it decides which Triton is installed.
$(call WITH,all demo bench wheels): | $(READY)/package

venv: $(call WITH,package all) ## everything that development needs; then `. .venv/bin/activate`

# ---- tests --------------------------------------------------------------------------------------------------------------------

# One process a core with one thread each, because the matrices of tests are small. Neighbours stay in one process, with their
# fixtures, until a process runs out of tests and takes some from another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

# What is left out here runs elsewhere: `make resources` runs the tests that compile GPU kernels, `make sanitize` those for races.
test: $(call WITH,package all) ## the test suite
	$(PYTEST) -m "not compiles and not races"

test-fast: $(call WITH,package all) ## a part of the suite: the public functions, and the backends tiled and cpu
	$(PYTEST) -m "not slow"

# The interpreter is not instrumented, so the sanitizers' runtimes are loaded first. All leaks are the interpreter's own, so they are
# not looked for.
BUILD := $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
RUNTIMES := $(foreach library,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(library)))

SANITIZED := LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 CLOP_HOST_SANITIZE=address,undefined \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical

sanitize: $(call WITH,package all) ## the tests of the compiled kernels, under AddressSanitizer and UBSan
	$(PYTEST) tests/host -m races
	$(SANITIZED) tests/host tests/contract -k host -m "not races"
	CLOP_CUDA=0 CLOP_NATIVE=1 CLOP_SANITIZE=address,undefined $(BUILD)
	$(SANITIZED) tests/cpu tests/contract -k "cpu and not memory_that and not does_not_load"; \
		status=$$?; $(BUILD); exit $$status

# Each has an environment of its own, build/oldest or build/newest.
oldest: ## build and test the package on the oldest supported versions
	PYTHON=$(PYTHON) tools/test_versions.sh $@

newest: ## build and test the package on the newest tested versions
	PYTHON=$(PYTHON) tools/test_versions.sh $@

# ---- measurements -------------------------------------------------------------------------------------------------------------

demo: $(call WITH,package demo) ## train on digits with plain PyTorch's loss and with this package's; writes train_digits.png
	$(BIN)/python examples/train_digits.py

# PRESET=readme BENCH=benchmarks/results/cpu makes the CPU results of docs/performance.md and the picture of the README: half an hour
# on two cores.
PRESET ?= quick
BENCH ?= build/bench

bench: $(call WITH,package bench) ## time and memory against other libraries; writes a report to build/bench in 10 minutes
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks.compare --preset $(PRESET) --output $(BENCH) --report

resources: $(call WITH,package all) ## compile changed kernels, check registers and spills; RESOURCES=--update writes tables
	$(PYTEST) -m compiles
	$(BIN)/python -m benchmarks.resources_cuda
	$(BIN)/python -m benchmarks.resources $(RESOURCES)
	tools/test_versions.sh kernels $(RESOURCES)

# ---- pages, wheels, style -----------------------------------------------------------------------------------------------------

# The builder's warning about its own next version does not concern these pages.
docs: $(call WITH,docs) ## build the documentation: build/docs/index.html
	@echo "==> building the pages"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "==> open build/docs/index.html"

wheels: $(call WITH,package wheels) ## build the wheels into dist/, and test each in a new environment
	$(BIN)/python tools/build_wheels.py

CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(call WITH,dev) ## format Python and C++, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(wildcard .clang-format),$(BIN)/clang-format -i $(CPP))

lint: $(call WITH,dev) ## check style and format of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(wildcard .clang-format),$(BIN)/clang-format --dry-run --Werror $(CPP))

types: $(call WITH,package all) ## check types with mypy
	$(BIN)/mypy

clean: ## remove everything that make has made
	rm -rf $(VENV) build dist *.egg-info clop_kernels/_native.abi3.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks \
		train_digits.png learning_rate_bound.* collapse
