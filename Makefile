# Each goal sets up what it needs by itself, in .venv, and may be repeated or interrupted at any time.
#   make demo   build a small data set, pretrain, compare, write a report
#   make test   every check; then also: make lint, make slow, make test-portable, make bench-toy
#   make docs   build the documentation site into build/site
# PYTHON=/path/to/python chooses the interpreter; DEMO_ARGS, DOCS_ARGS and PYTEST_ARGS are handed on.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo docs test test-portable lint slow bench-toy clean

VENV := .venv
BIN := $(VENV)/bin
INSTALL_INPUTS := pyproject.toml constraints.txt src/asit/__init__.py

# Pins hold for the build environment too; pip reads one or the other name, by its age.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n '2,5s/^# *//p' Makefile

demo: $(VENV)/.asit-demo
	$(BIN)/asit demo $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.asit-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.asit-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(DOCS_ARGS)
	@echo "open build/site/index.html, or read it with: $(BIN)/mkdocs serve"

slow: $(VENV)/.asit-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

# What one machine can show of others: kernels of older processors and of AMD's (MKL_CBWR takes the paths that MKL takes
# there), and more threads than one. Where a library is absent (MKL on ARM) its variable does nothing.
PORTABLE := OMP_NUM_THREADS=1,ATEN_CPU_CAPABILITY=avx2,ONEDNN_MAX_CPU_ISA=AVX2,MKL_CBWR=AVX2 \
  OMP_NUM_THREADS=2,ATEN_CPU_CAPABILITY=default,MKL_CBWR=COMPATIBLE \
  OMP_NUM_THREADS=3,ONEDNN_MAX_CPU_ISA=AVX512_CORE \
  OMP_NUM_THREADS=2
# Of the slow tests those of resuming, of kills and of several processes; for all: PORTABLE_SLOW=tests.
PORTABLE_SLOW := tests/runs/test_resume.py tests/runs/test_distributed.py

test-portable: $(VENV)/.asit-dev
	@failed=0; for setting in $(PORTABLE); do \
	  for chosen in "-n 2" "-m slow $(PORTABLE_SLOW)"; do \
	    env $${setting//,/ } $(BIN)/python -m pytest -q $$chosen $(PYTEST_ARGS) >$(VENV)/portable.log 2>&1 && ended=passed || ended=FAILED; \
	    echo "$$ended: $${setting//,/ } pytest $$chosen: $$(tail -n 1 $(VENV)/portable.log)"; \
	    if [ $$ended = FAILED ]; then failed=1; grep -E "^(FAILED|ERROR)" $(VENV)/portable.log; fi; \
	  done; \
	done; exit $$failed

# Two at a time: at this size the figures mean nothing, and what is checked is that each script ends well.
bench-toy: $(VENV)/.asit-dev
	@printf '%s\n' bench/*.py | OMP_NUM_THREADS=1 xargs -P 2 -I {} bash -c 'log=$$(mktemp); \
	  if $(BIN)/python {} --toy >"$$log" 2>&1; then echo "passed: {} --toy ($$SECONDS s)"; rm "$$log"; \
	  else cat "$$log"; rm "$$log"; echo "FAILED: {} --toy"; exit 255; fi'

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# A stamp is written last, so an interrupted installation is simply done again. The development set holds the demo's.
$(VENV)/.asit-%: $(INSTALL_INPUTS) | $(VENV)/.made
	@echo "installing asit-audio[$*] into $(VENV); the first time takes some minutes"
	@$(BIN)/python -m pip install -qq -e ".[$*]" || { \
	  echo "The installation failed: see the lines above, then run the same command again." >&2; exit 1; }
	@# The oracle of the log-mel: its pure-Python part alone is read, so none of what it would pull in is
	@# installed, and it lies apart, where no other package comes upon it.
	@if [ "$*" = dev ]; then $(BIN)/python -m pip install -qq --no-deps --upgrade --target $(VENV)/oracles torchaudio==2.11.0 || \
	  echo "torchaudio could not be installed: the tests that compare with it will be skipped" >&2; fi
	@touch $@

$(VENV)/.made:
	@set -e; chosen=; found=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.14 python); do \
	  version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  found="$$found $$candidate ($$version)"; \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "Found no Python 3.11 or newer; found:$${found:- none}." >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if ! "$$chosen" -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$chosen cannot make a virtual environment: its venv or ensurepip module is missing." >&2; \
	  echo "On Debian or Ubuntu: apt-get install python3-venv (or python3.X-venv); then run this again." >&2; exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "making $(VENV) with $$chosen"; "$$chosen" -m venv --clear $(VENV); \
	fi; \
	touch $@
