# make run | test | test-gpu | bench-gpu | torch-suite | benchmark | lint | tsan | asan | models | stress | build | clean.
# Each does its own set-up; a second run starts in seconds.
#
#   PYTHON=python3.12 make test           the interpreter that .venv is made from
#   TORCH_VERSION=2.12.0 make test        the torch in .venv (2.11 to 2.15)
#   PYCOMM_PYTHON=/path/python make test  no .venv: that interpreter, with the torch it has
#   TEST_WORKERS=1 make test              tests at a time (3: many wait for deadlines and processes)
#   PYCOMM_CUDA=0|1 make test             without | with the CUDA sources (default: where nvcc is found)

SHELL := /bin/bash
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TEST_WORKERS ?= 3
CTEST := ctest -j $(TEST_WORKERS) --output-on-failure --test-dir
BUILD_TOOLS := "setuptools>=77" wheel ninja
export PYCOMM_WERROR := 1
# Where it is set, as in many images, every rank of every test would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

ifdef PYCOMM_PYTHON
  PY := $(PYCOMM_PYTHON)
  BIN := $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
  STAMPS := build/stamps/$(subst /,_,$(PYCOMM_PYTHON))
else
  PY := .venv/bin/python
  BIN := $(CURDIR)/.venv/bin
  STAMPS := .venv/stamps
endif
export PATH := $(BIN):$(PATH)

TORCH := $(STAMPS)/torch-$(TORCH_VERSION)
BUILT := $(STAMPS)/built-torch-$(TORCH_VERSION)-cuda$(PYCOMM_CUDA)
INSTALLED := $(STAMPS)/installed-torch-$(TORCH_VERSION)
# Folders too: their times change when a file is added or removed.
SOURCES := $(shell find csrc -type d -o -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inc')
CC_FILES := $(filter %.cc %.cu %.h %.cuh %.inc,$(SOURCES) $(wildcard tests/cc/* tests/cc/fake_nccl/*))

.PHONY: run test test-gpu bench-gpu torch-suite benchmark lint format tsan asan models stress build clean
.DELETE_ON_ERROR:

run: build
	pycomm launch --hosts 2 --ranks-per-host 2 --output rank0 -- pycomm-train run default

# pycomm, Gloo, MPI and oneCCL take turns; half an hour, best with nothing else running.
benchmark: build
	$(PY) benchmarks/peers.py
	$(PY) benchmarks/host_link_bytes.py
	$(PY) benchmarks/readme.py

test: build build/cc-plain$(PYCOMM_CUDA)/CMakeCache.txt
	cmake --build build/cc-plain$(PYCOMM_CUDA)
	$(CTEST) build/cc-plain$(PYCOMM_CUDA)
	$(PY) -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder tests

# On a machine with GPUs, nvcc, and a Python that has a torch for CUDA, ninja, cmake and pytest (PYCOMM_PYTHON; nothing is
# fetched then). Each fails where there is no GPU. Its compiler may be any, so what that warns of is no error.
test-gpu bench-gpu: export PYCOMM_CUDA := 1
test-gpu bench-gpu: export PYCOMM_WERROR := 0
test-gpu: BEGAN := $(shell date +%s)
test-gpu: $(BUILT)
	cmake -S csrc -B build/cc-gpu -G Ninja -DPYCOMM_WERROR=OFF -DPYCOMM_CUDA_ARCH=native \
	  -DPYCOMM_CUDA_HOME="$$($(PY) setup.py cuda_home)"
	cmake --build build/cc-gpu -j 8 --target gpu_kernels gpu_moe gpu_threads
	PYCOMM_NCCL_LIB="$$($(PY) -c 'from pycomm.gpus import nccl_wheel; print(nccl_wheel())')" \
	  tests/gpu/kernels.sh build/cc-gpu/tests "$$($(PY) setup.py cuda_home)"
	PYTHONPATH=tests:$(CURDIR) PYCOMM_TEST_START=spawn $(PY) -m pytest -q tests/gpu \
	  $$($(PY) -c 'import xdist; print("-n 3")' 2>/dev/null); ended=$$?; cat build/cc-gpu/tests/not_run; \
	  $(PY) -c 'import cupy' 2>/dev/null || echo "NOT RUN: arrays of CuPy's; it cannot be imported"; \
	  echo "test-gpu: $$(($$(date +%s) - $(BEGAN))) s, build included"; exit $$ended

bench-gpu: $(BUILT)
	cmake -S csrc -B build/cc-gpu -G Ninja -DPYCOMM_WERROR=OFF -DPYCOMM_CUDA_ARCH=native \
	  -DPYCOMM_CUDA_HOME="$$($(PY) setup.py cuda_home)"
	cmake --build build/cc-gpu -j 8 --target bench_gpu_kernels bench_gpu_moe bench_gpu_peers
	PYCOMM_NCCL_LIB="$$($(PY) -c 'from pycomm.gpus import nccl_wheel; print(nccl_wheel())')" \
	  PYTHONPATH=$(CURDIR) $(PY) benchmarks/gpu.py build/cc-gpu/tests

# torch's own distributed tests at 2, 3 and 4 ranks, on Gloo and on pycomm; ten minutes. Writes docs/torch_suite.md.
torch-suite: build
	$(PY) tests/torch_suite.py

lint: build
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CC_FILES)

format: build
	ruff check --fix .
	ruff format .
	clang-format -i $(CC_FILES)

# ThreadSanitizer's fixed shadow mapping cannot live with every address layout that the kernel may draw, so none is drawn
# where that is allowed (a container may forbid it).
SAME_ADDRESSES = $(shell setarch -R true 2>/dev/null && echo setarch -R)
tsan: build/cc-thread/CMakeCache.txt
asan: build/cc-address/CMakeCache.txt
tsan asan:
	cmake --build $(<D)
	$(SAME_ADDRESSES) $(CTEST) $(<D)

# Every shared-memory protocol, checked exhaustively by spin; and that what is known to be wrong is found.
models:
	@command -v spin >/dev/null || { test $$(id -u) = 0 && command -v apt-get >/dev/null && apt-get install -qq -y spin; } \
	  || { echo "make models needs spin: apt-get install spin (http://spinroot.com for other systems)"; exit 1; }
	$(PYTHON) models/check.py

# Everything at once, for minutes; a failure prints the seed that repeats it.
stress: export PYCOMM_STRESS_S ?= 120
stress: build build/cc-plain$(PYCOMM_CUDA)/CMakeCache.txt build/cc-thread/CMakeCache.txt build/cc-address/CMakeCache.txt
	for kind in plain$(PYCOMM_CUDA) thread address; do \
	  cmake --build build/cc-$$kind --target test_stress || exit 1; \
	  $(SAME_ADDRESSES) build/cc-$$kind/tests/test_stress || exit 1; \
	done
	$(PY) -m pytest -q tests/test_stress.py

build: $(BUILT) $(INSTALLED)

clean:
	rm -rf build .venv/stamps/built* pycomm/_C*.so

# torch is pinned, never resolved: a free choice would take the newest, with gigabytes of CUDA.
$(TORCH):
ifndef PYCOMM_PYTHON
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q torch==$(TORCH_VERSION)
endif
	$(PY) -c 'import ninja, setuptools, wheel; assert int(setuptools.__version__.split(".")[0]) >= 77' 2>/dev/null \
	  || $(PY) -m pip install -q $(BUILD_TOOLS)
	mkdir -p $(STAMPS) && rm -f $(STAMPS)/* && touch $@

$(BUILT): $(TORCH) setup.py $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	rm -f $(STAMPS)/built-* && touch $@

# The module is built by now; this links the checkout into the environment and brings the other packages. Of these a run
# imports a small part, which Python compiles when it does.
$(INSTALLED): $(TORCH) pyproject.toml setup.py | $(BUILT)
	$(PY) -m pip install -q --no-compile --no-build-isolation -e '.[train,bench,dev]'
	touch $@

# The plain build has the CUDA sources too, where the module has them; a sanitizer sees the engine alone.
build/cc-%/CMakeCache.txt: $(INSTALLED)
	cmake -S csrc -B $(@D) -G Ninja -DPYCOMM_SANITIZE=$(filter thread address,$*) \
	  $(if $(filter plain%,$*),-DPYCOMM_CUDA_HOME="$$($(PY) setup.py cuda_home)")
