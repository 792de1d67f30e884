# Every target creates .venv on its first use. PYTHON chooses the interpreter (3.10 or newer), DALI the CUDA generation of
# its wheel (cuda13 or cuda12; both run on a machine without a GPU).
PYTHON ?= python3
DALI ?= cuda13
BIN := .venv/bin

.PHONY: help install pretrain test test-all test-gpu test-slurm lint docs clean

help:
	@echo "make install    create .venv and install the project into it"
	@echo "make pretrain   install, then train the quickstart recipe on the built-in photographs"
	@echo "make test       install, then run the tests (under 20 minutes on 2 cores)"
	@echo "make test-all   with the long suites and test-slurm"
	@echo "make test-gpu   the tests that need CUDA devices"
	@echo "make test-slurm a run under a real Slurm of two virtual nodes (installs Debian packages)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation pages, into build/docs"

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(DALI),test,dev,docs]"
	touch $@

install: .venv/installed

pretrain: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed pretrain_nepa.py --ds_config ds_configs/zero2.json

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow and not gpu and not slurm"

test-all: .venv/installed
	$(BIN)/python -m pytest -m "not gpu and not slurm"
	$(BIN)/python -m pytest -m slurm

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
	rm -rf .venv build *.egg-info
