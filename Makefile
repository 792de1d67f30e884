# Every target creates .venv on its first use. PYTHON chooses the interpreter (3.10 or newer), DALI the CUDA generation of
# its wheel (cuda13 or cuda12; both run on a machine without a GPU), EXTRAS what else is installed. WHEELHOUSE=dir
# installs from the wheels in dir, which `make wheelhouse` collected, and asks no index.
PYTHON ?= python3
DALI ?= cuda13
EXTRAS ?= test,dev,docs
WHEELHOUSE ?=
BIN := .venv/bin
# file by file, on two cores
DEFAULT_TESTS := -n 2 --dist loadfile -m "not slow and not gpu and not slurm"
# pip's own variables, so that what it builds in an environment of its own obeys them, too
OFFLINE := $(if $(WHEELHOUSE),PIP_NO_INDEX=1 PIP_FIND_LINKS=$(abspath $(WHEELHOUSE)))
comma := ,
WHAT := $(DALI)$(if $(EXTRAS),$(comma)$(EXTRAS))

.PHONY: help install wheelhouse pretrain test test-all test-oldest test-gpu test-slurm lint docs clean

help:
	@echo "make install    create .venv and install the project into it"
	@echo "make wheelhouse  collect every wheel that make install needs in build/wheelhouse; then, without a network:"
	@echo "make install WHEELHOUSE=build/wheelhouse"
	@echo "make pretrain   install, then train the quickstart recipe on the built-in photographs"
	@echo "make test       install, then run the tests (under 20 minutes on 2 cores)"
	@echo "make test-all   with the long suites and test-slurm"
	@echo "make test-oldest the tests with the oldest supported releases of every package, in .venv-oldest"
	@echo "make test-gpu   the tests that need CUDA devices"
	@echo "make test-slurm a run under a real Slurm of two virtual nodes (installs Debian packages)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation pages, into build/docs"

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(OFFLINE) $(BIN)/python -m pip install --quiet --upgrade pip
	$(OFFLINE) $(BIN)/python -m pip install --quiet --editable ".[$(WHAT)]"
	touch $@

install: .venv/installed

# also what pip and the builds of source distributions (DeepSpeed's is one) take; CONSTRAINTS=file chooses releases
wheelhouse:
	$(PYTHON) -m venv build/wheelhouse-env
	build/wheelhouse-env/bin/python -m pip install --quiet --upgrade pip
	build/wheelhouse-env/bin/python -m pip wheel --quiet --wheel-dir build/wheelhouse \
		$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) ".[$(WHAT)]" pip setuptools wheel

pretrain: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed pretrain_nepa.py --ds_config ds_configs/zero2.json

test: .venv/installed
	$(BIN)/python -m pytest $(DEFAULT_TESTS)

test-all: .venv/installed
	$(BIN)/python -m pytest -m "not gpu and not slurm"
	$(BIN)/python -m pytest -m slurm

.venv-oldest/installed: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python tests/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[$(DALI),test]"
	touch $@

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(DEFAULT_TESTS)

test-slurm: .venv/installed
	$(BIN)/python -m pytest -m slurm

test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu tests/gpu tests/data/test_gpu.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-oldest build *.egg-info
