# make demo | test | lint | bench | floor | aot | gpu | asan | clean
# Every target but gpu makes its own virtual environment (.venv) when there is none.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
RESULTS ?= benchmarks/results
# A process of tests per core, at most four. A file's tests stay together, since some share what is expensive, and files
# keep their order, in which the long ones come before the last.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP_FLAGS ?= --quiet --disable-pip-version-check
# Without a GPU here one architecture is enough to see that the CUDA kernels compile.
ifeq ($(shell command -v nvidia-smi),)
export TORCH_CUDA_ARCH_LIST ?= 9.0a
endif
SOURCES := pyproject.toml setup.py $(CONSTRAINTS) $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint bench floor aot gpu asan clean install

install: $(VENV)/.installed

# The CUDA kernels are compiled for the emulator too, which runs them on the CPU in the tests.
# torch, torchvision and timm in one resolution: torchvision's wheel matches one build of torch only.
$(VENV)/.requirements: pyproject.toml $(CONSTRAINTS)
	@echo "1 of 3: torch, torchvision and timm into $(VENV), gigabytes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) 'setuptools>=77' wheel ninja torch torchvision timm
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	@echo "2 of 3: the C++ and CUDA kernels are compiled, the other packages installed (one to three minutes)"
	DEPICT_KERNELS_EMULATE_CUDA=1 $(BIN)/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	@echo "3 of 3: what works here"
	$(BIN)/python -m depict_kernels
	touch $@

demo: install
	$(BIN)/python train/run.py --config train/configs/demo.yaml --run.overwrite true
	@echo "Pictures: runs/demo/plots   Numbers: runs/demo/results.json"

test: install
	$(BIN)/python -m pytest tests -m "not gpu" -q --durations=15 $(PARALLEL)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# On the CPU, under ten minutes on two cores: a record, its page and plots, and the README's figures from it.
bench: install
	$(BIN)/python -m pytest benchmarks -m "not gpu" -q --record $(RESULTS) --benchmark-columns=median,iqr,rounds
	-$(BIN)/python benchmarks/bench_loader.py --output benchmarks/results/loader_cpu.json
	$(BIN)/python benchmarks/report.py

# The oldest supported torch, with its Triton, in an environment of its own.
floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

# Compiles every Triton and CUDA kernel for every target, without a GPU (minutes); CI compiles the core set in the tests.
aot: install
	$(BIN)/python benchmarks/kernel_report.py --targets sm_80 sm_90 sm_100 gfx942 \
	    --architectures sm_80 sm_90a sm_100 sm_120

# On a GPU machine, offline, with PYTHON as it is (torch, Triton, timm, numpy, pytest, pytest-benchmark), within GPU_SECONDS:
# build, tests and compute-sanitizer, benchmarks, what auto takes. GPU_PARTS="build check" runs some of it.
GPU_SECONDS ?= 2400
gpu:
	PYTHONPATH=$(CURDIR):$${PYTHONPATH:-} $(PYTHON) benchmarks/gpu.py --seconds $(GPU_SECONDS) --record $(RESULTS) \
	    $(if $(GPU_PARTS),--parts $(GPU_PARTS))

# The C++ kernels' tests under AddressSanitizer and UBSan.
asan: install
	bash csrc/asan.sh $(BIN)/python

# What make itself made: a data set and the runs trained on it stay.
HEX := [0-9a-f][0-9a-f][0-9a-f][0-9a-f]
clean:
	rm -rf .venv .venv-floor build dist runs/demo data/generated data/generated-$(HEX)$(HEX) .cache *.egg-info
	rm -f depict_kernels/*.so depict_kernels/_build*.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
