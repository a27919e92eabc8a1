# make setup once (the others do it when needed); make demo; make test; make check
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv with pinned dependencies (about 2 minutes, 2.2 GB)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or give PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)   ## the bundled scenes with the bundled tiny driver: relevance, maps, their faithfulness, a report
	$(BIN)/python jobs/pipeline.py run=demo kinematic_metric=[longitudinal_progress,curv_energy] \
	    measure=8 regenerate=2 randomise=2
	@echo; echo "look: outputs/demo/report/index.html; next: source $(VENV)/bin/activate; python jobs/pipeline.py --help"

test: $(READY)   ## unit, Ray and end-to-end tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m "not slow and not chaos"

test-all: test   ## the same and the slow ones, those that kill processes included (under 40 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m "slow or chaos"

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite the files
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
