# make demo | test | test-slow | test-faults | test-platform | lint | format | venv | lock        (PYTHON=python3.12 chooses the interpreter)
SHELL := /bin/sh
UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready

SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUITABLE)' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help venv demo test test-slow test-faults test-platform lint format lock
help:
	@sed -n 's/^# //;1p' Makefile

venv: $(READY)

# The environment in .venv: made once, made again when requirements.txt changes.
$(READY): requirements.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null || { \
	  echo "missing: Python 3.11, 3.12 or 3.13; Debian or Ubuntu: apt-get install python3 python3-venv (then: make PYTHON=python3.12)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "missing: the venv module of $(PYTHON); Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test "$$(uname)" = Darwin || command -v g++ >/dev/null || { \
	  echo "missing: a C++ compiler; Debian or Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(BIN)/python -c 'import pip; $(SUITABLE)' 2>/dev/null || "$(PYTHON)" -m venv --clear .venv
	@echo "installing the pinned packages into .venv (a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@UV_SYSTEM_CERTS=1 VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --require-hashes -r requirements.txt || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(READY)
	$(BIN)/metapeft demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not faults" -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not faults"

# Kills at every write, full and read-only disks, damaged files, wild input and clocks, databases that go, floods: hours.
# METAPEFT_FAULT_EVERY=5 tries every fifth point; METAPEFT_FUZZ and METAPEFT_REQUESTS are cases per test.
test-faults: $(READY)
	METAPEFT_FUZZ=$${METAPEFT_FUZZ:-2000} METAPEFT_REQUESTS=$${METAPEFT_REQUESTS:-100} \
	  $(BIN)/python -m pytest tests/faults

# The whole platform as real processes (PostgreSQL, Redis, S3, MLflow, Airflow with two Celery workers): 5 to 12 minutes.
test-platform: $(READY) .venv/.platform
	METAPEFT_TEST_PLATFORM=1 PYTHONPATH=.venv/.platform $(BIN)/python -m pytest tests/platform

.venv/.platform: docker/requirements.txt tests/platform/requirements.txt $(READY)
	@{ command -v redis-server && { command -v initdb || ls /usr/lib/postgresql/*/bin/initdb; }; } >/dev/null 2>&1 || { \
	  echo "missing: apt-get install postgresql redis-server" >&2; exit 1; }
	@rm -rf $@
	@UV_SYSTEM_CERTS=1 VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --require-hashes --target $@ \
	  -r docker/requirements.txt -r tests/platform/requirements.txt
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pins: names, versions and hashes, no addresses; made for the oldest Python, valid for all.
lock: $(READY)
	UV_SYSTEM_CERTS=1 VIRTUAL_ENV=.venv $(BIN)/uv pip compile --universal --generate-hashes --no-header --no-annotate --extra dev \
	  --python-version 3.11 pyproject.toml -o requirements.txt
