# make install   the environment .venv, from the versions in constraints/
# make demo      the main job on this machine, a few minutes
# make test      what CI runs: linter, type checker, tests
# make bench     the networks of benchmarks/ against dense engines, an hour or two; goes on where it stopped
# make slow      the tests of many minutes
# make test-arm  what is checked on an emulated aarch64; sets it up by apt and pip (Debian, Ubuntu)
# make pins      renew constraints/ for $(PYTHON)
# make clean     remove everything made here

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ROOMS := frontends passes schedules
# The rooms under the package's name, as the type checker wants to see them.
TYPES := build/types

# TVM would fetch tuned schedules from the network.
export TOPHUB_LOCATION := NONE

.DEFAULT_GOAL := install
.PHONY: install demo test bench slow test-arm lint types pins clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard constraints/*.txt)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@version=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	pins=constraints/$$version.txt; \
	test -f $$pins || { echo "Python $$version has no $$pins: take 3.10 to 3.13, as in make PYTHON=python3.11" >&2; exit 1; }; \
	echo "Installing into $(VENV) for Python $$version; about 3 minutes the first time"; \
	pip="$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $$pins"; \
	$$pip --upgrade pip setuptools && PYTHONWARNINGS="ignore:Editable installation" $$pip --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/jointsparse demo --output demo-output

test: lint types
	$(BIN)/python -m pytest -m "not slow and not arm" -n 2 --dist worksteal

# BENCH="--network resnet18 --seconds 1" measures a part of it.
bench: $(INSTALLED)
	@mkdir -p build
	$(BIN)/python -m benchmarks.against_peers --layers --json build/bench.json $(BENCH)

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-arm: build/arm/ready
	$(BIN)/python -m pytest -m arm

build/arm/ready: $(INSTALLED) tests/arm/setup.sh
	sh tests/arm/setup.sh build/arm $(BIN)/python

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	@mkdir -p $(TYPES)/jointsparse
	@for room in $(ROOMS); do ln -sfn ../../../$$room $(TYPES)/jointsparse/$$room; done
	MYPYPATH=$(TYPES) $(BIN)/mypy $(ROOMS:%=--package jointsparse.%)

pins:
	$(PYTHON) constraints/pin.py

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
