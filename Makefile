# `make demo`, `make quick` and `make test` work on a fresh clone; `make help` lists the rest.

# The first of these that runs and is supported; or give another: make test PYTHON=/path/to/python3.12
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)
PYTHON312 ?= python3.12
VENV ?= .venv
# Processes that share the tests, file by file and in the order of tests/conftest.py.
JOBS ?= 2
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -m
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest
SHARED := -n $(JOBS) --dist loadfile --no-loadscope-reorder
DEMO := runs/demo

.PHONY: help demo quick test browser parity exactness kills rehearsal kernels-report test-py312 lint types clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) $(DEMO)-data/.prepared  ## Train a small model on real text, in minutes; goes on where it was stopped
	$(RUN) megatron_dlm train --config examples/configs/demo.yaml
	$(RUN) megatron_dlm plot $(DEMO) --output $(DEMO)/loss.png
	$(RUN) megatron_dlm export --checkpoint $(DEMO) --output $(DEMO)/hf --overwrite
	@echo "What a model of some minutes of training on two CPU cores fills in, loaded with AutoModelForCausalLM:"
	$(VENV)/bin/python examples/infill.py $(DEMO)/hf
	$(RUN) megatron_dlm sample --checkpoint $(DEMO)/hf --prompt "def " --max-new-tokens 96 --trace $(DEMO)/denoising.html

$(DEMO)-data/.prepared: | $(STAMP)
	$(RUN) megatron_dlm prepare --embedded --train-sentencepiece 1024 --valid-fraction 0.02 --output $(DEMO)-data --overwrite
	touch $@

quick: lint  ## Build the environment, check style, run the tests that take seconds: the first thing to try
	$(PYTEST) $(SHARED) tests/quick

test: lint types browser  ## Build the environment, check style and types, run all tests
	$(PYTEST) $(SHARED)
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) tests/interpreter

browser:  ## Install Chromium for the tests of the HTML page, where that asks for no password
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	log=$$(mktemp); export DEBIAN_FRONTEND=noninteractive; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing Chromium for the tests (apt-get) ..." \
		&& { timeout 60 apt-get update; timeout 600 apt-get install -y --no-install-recommends chromium; } \
		>$$log 2>&1 </dev/null; then echo "Chromium is installed."; \
	else tail -n 1 $$log; echo "No Chromium: the tests of the HTML page are skipped (apt-get install chromium)."; fi; rm -f $$log

parity: $(STAMP)  ## Print the whole table of layouts against one process (minutes)
	$(PYTEST) tests/distributed/test_parity.py -s -m 'slow or not slow'

exactness: $(STAMP)  ## Print how resumed and resharded runs differ from straight ones (minutes)
	$(PYTEST) tests/distributed/test_resume.py -s -m 'slow or not slow'

kills: $(STAMP)  ## Print how runs that were killed in saves end, 20 kills a layout (minutes)
	$(PYTEST) tests/distributed/test_killed_saves.py -s -m 'slow or not slow'

rehearsal: $(STAMP)  ## Print rehearsed ranks of `plan` beside real ones (minutes)
	$(PYTEST) tests/distributed/test_rehearsal.py -s -m 'slow or not slow'

kernels-report: $(STAMP)  ## Registers, spills and instructions of every kernel, compiled for sm_90
	$(PYTEST) -s $(wildcard tests/*/test_aot_*.py)

test-py312:  ## The same with Python 3.12 and the newest supported megatron-core
	$(MAKE) test PYTHON=$(PYTHON312) VENV=.venv312

lint: $(STAMP)  ## Style (ruff)
	$(RUN) ruff check .

types: $(STAMP)  ## Types of the library and the kernels (mypy)
	$(RUN) mypy

clean:  ## Remove the environments and caches, but not runs/
	rm -rf .venv .venv312 .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find megatron_dlm kernels tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: asked for by another package, its newest build for GPUs would come.
$(STAMP): constraints.txt setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; give it as: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet -c constraints.txt torch setuptools
	$(RUN) pip install --quiet -c constraints.txt --no-build-isolation -e '.[hf,eval,log,dev]'
	touch $@
