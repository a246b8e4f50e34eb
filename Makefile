# `make demo` and `make test` are all a fresh clone needs: the first of them creates the environment.
# An active virtual environment is used as it is; without one, .venv is made with $(PYTHON).
SHELL := bash
PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.es_trl-installed

# The versions the project was measured with. A torch that is already there is kept.
TORCH ?= torch==2.14.1 torchvision==0.29.1

CONFIG ?= recipes/tiny_sana_sprint/es/config.yaml
SOURCES := es_trl recipes tests docs

.DEFAULT_GOAL := help
.PHONY: help install demo test soak style quality bench audit docs

help:  ## show the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create the environment (once, and again when pyproject.toml changes)

$(STAMP): pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'es_trl needs Python 3.11 or newer: remove $(VENV) and run "make install PYTHON=python3.11"' >&2; exit 1; }
	@echo 'Installing into $(VENV): a few minutes, once.'
	@$(PY) -c 'import torch, torchvision' 2>/dev/null || $(PY) -m pip install -qq $(TORCH)
	@$(PY) -m pip install -qq --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## post-train the shipped model on the CPU and show that the pictures got better
	$(PY) recipes/es_sana.py --config $(CONFIG)

# Two workers of one thread each: a file's tests stay together, because some share what a fixture has trained.
test: $(STAMP)  ## run the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

soak: $(STAMP)  ## what takes longer than a test may: kills, damaged files, a long run (tests/soak)
	$(PY) tests/soak/kill_resume.py --kills 20 --output outputs/soak/kills.jsonl
	$(PY) tests/soak/fuzz.py --inputs 200000 --output outputs/soak/fuzz.json
	$(PY) tests/soak/long_run.py --logging_steps 0 --sample_steps 0 --output outputs/soak/long_run.json

style: $(STAMP)  ## format and fix
	$(PY) -m ruff format $(SOURCES)
	$(PY) -m ruff check --fix $(SOURCES)

quality: $(STAMP)  ## check format, lint and types, change nothing
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy

bench: $(STAMP)  ## throughput, step overhead and memory as JSON
	$(PY) recipes/benchmarks/throughput.py

audit: $(STAMP)  ## look the installed packages up in the database of vulnerabilities (needs the network)
	$(PY) .ci/audit.py

docs: $(STAMP)  ## build the documentation into outputs/site
	$(PY) -m pip install -qq --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir outputs/site
