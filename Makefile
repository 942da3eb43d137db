# The commands of this repository. Every target sets itself up: `make demo` on a fresh clone is enough.
# Needs python3 >= 3.11, a C++20 compiler and make. On Debian and Ubuntu, as root, missing packages are installed.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# Debian packages without which some tests and the emulated device cannot run: compiler and emulator for arm64, sshd, and
# the browser that a report's page is looked at with.
DEBIAN_PACKAGES := g++-aarch64-linux-gnu qemu-user openssh-server chromium

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
NATIVE := $(shell find csrc cmake CMakeLists.txt -type f 2>/dev/null)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup
# One thread per test worker: the workers share the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# What of edgerun is measured or compared reads only its own folder, never a user's cache of models.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help set-up packages demo test test-slow test-all lint format bench bench-full lab-sample arm64 clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

set-up: $(STAMPS)/build $(STAMPS)/packages  ## the environment and the native build

$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "edgerun needs python3 >= 3.11; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Pass PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "'$(PYTHON)' has no venv module: install it (Debian: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch first: what is installed after it then takes the build that is there.
$(STAMPS)/requirements: $(STAMPS)/python pyproject.toml
	$(BIN)/pip install --quiet $$($(BIN)/python .ci/requirements.py torch)
	$(BIN)/python .ci/requirements.py build | $(BIN)/pip install --quiet -r /dev/stdin
	@touch $@

$(STAMPS)/build: $(STAMPS)/requirements $(NATIVE)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[export,video,ray,test,lint]"
	@touch $@

packages: $(STAMPS)/packages  ## what the emulated device and some tests need from Debian

$(STAMPS)/packages: $(STAMPS)/python
	@sh .ci/debian_packages.sh $@ $(DEBIAN_PACKAGES)

bench: set-up  ## the attention benchmark on a reduced grid, into bench/results/; ten minutes at most on two cores
	$(BIN)/python bench/ops/dhsa_attention.py --grid reduced

bench-full: set-up  ## the attention benchmark on its whole grid; hours, and the same command goes on after a stop
	$(BIN)/python bench/ops/dhsa_attention.py --grid full
	$(BIN)/python bench/speedup_picture.py

lab-sample: set-up  ## two minutes of the accuracy lab, checked for what must hold, into build/accuracy_lab/
	rm -rf build/accuracy_lab
	$(BIN)/python bench/accuracy_lab.py sample --work build/accuracy_lab

arm64: set-up  ## cross-build the runner for arm64 Linux into build-arm64/, where a cross compiler is
	@if command -v aarch64-linux-gnu-g++ >/dev/null; then $(BIN)/python cmake/build_arm64.py --jobs $(JOBS); \
	  else echo "note: no aarch64-linux-gnu-g++ here, so the arm64 build is left out (make packages)"; fi

demo: set-up arm64  ## the shipped models: a long prompt answered on two devices, clips of captions; into demo_output/
	$(BIN)/edgerun demo --output demo_output
	$(BIN)/edgerun demo video --output demo_output/video

test: set-up arm64  ## every test but the slow ones; 15 minutes at most with set-up on two cores
	$(ONE_THREAD) $(PYTEST) -m "not slow" tests

test-slow: set-up arm64  ## only the slow tests
	$(ONE_THREAD) $(PYTEST) -m slow tests

test-all: test test-slow  ## every test

lint: $(STAMPS)/build  ## ruff, mypy and clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.h')

format: $(STAMPS)/build  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h')

clean:  ## remove what was built; keeps the environment's downloaded packages
	rm -rf build build-arm64 dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMPS)/build $(STAMPS)/packages
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
