# `make demo` and `make test` are all a fresh clone needs: the first of them creates the environment.
# An active virtual environment is used as it is; without one, .venv is made with $(PYTHON).
SHELL := bash
PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.es_trl-installed
DEV_STAMP := $(VENV)/.es_trl-dev-installed

# The versions the project was measured with. A torch that is already there is kept. Where there is no GPU, Linux takes
# the CPU build if its index answers; every other build comes from PyPI.
CONSTRAINTS ?= constraints.txt
TORCH ?= torch==2.14.1 torchvision==0.29.1
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(PY) -m pip install -qq --constraint $(CONSTRAINTS)

CONFIG ?= recipes/tiny_sana_sprint/es/config.yaml
SOURCES := es_trl recipes tests docs
FAST := $(addprefix tests/test_,$(addsuffix .py,config cli_methods es_estimator es_fitness es_noise evaluation_statistics \
  evaluation_protocol house prompts policy_advantages rewards_registry rewards_remote rewards_set trainer_config))

.DEFAULT_GOAL := help
.PHONY: help install torch demo test test-fast soak style quality bench audit docs

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(DEV_STAMP)  ## create the environment (once, and again when the versions change)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'es_trl needs Python 3.11 or newer: remove $(VENV) and run "make install PYTHON=python3.11"' >&2; exit 1; }
	@echo 'Installing into $(VENV): a few minutes, once.'
	@$(MAKE) --no-print-directory torch
	@$(PIP) --editable .
	@touch $@

torch:  # of this machine
	@$(PY) -c 'import torch, torchvision' 2>/dev/null || { \
	  test "$$(uname -sm)" = 'Linux x86_64' -a ! -e /dev/nvidiactl -a ! -e /dev/kfd && \
	  $(PIP) --index-url $(CPU_INDEX) --retries 0 --timeout 15 $(TORCH) 2>/dev/null; } || $(PIP) $(TORCH)

$(DEV_STAMP): $(STAMP)
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## post-train the shipped model on the CPU and show that the pictures got better
	$(PY) recipes/es_sana.py --config $(CONFIG)

# Two workers of one thread each: a file's tests stay together, because some share what a fixture has trained. The order
# of the files is that of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(DEV_STAMP)  ## run the test suite
	$(PYTEST) tests

soak: $(DEV_STAMP)  ## what takes longer than a test may: kills, damaged files, a long run (tests/soak)
	$(PY) tests/soak/kill_resume.py --kills 20 --output outputs/soak/kills.jsonl
	$(PY) tests/soak/fuzz.py --inputs 200000 --output outputs/soak/fuzz.json
	$(PY) tests/soak/long_run.py --logging_steps 0 --sample_steps 0 --output outputs/soak/long_run.json

test-fast: $(DEV_STAMP)  ## the part of it that draws nothing
	$(PYTEST) $(FAST)

style: $(DEV_STAMP)  ## format and fix
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

quality: $(DEV_STAMP)  ## check format, lint and types, change nothing
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy

bench: $(DEV_STAMP)  ## throughput, step overhead and memory as JSON
	$(PY) recipes/benchmarks/throughput.py

audit: $(DEV_STAMP)  ## look the installed packages up in the database of vulnerabilities (needs the network)
	$(PY) .ci/audit.py

docs: $(DEV_STAMP)  ## build the documentation into outputs/site
	$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir outputs/site
