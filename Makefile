# MemOS on Ray. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: help setup test lint clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 18

# torch goes first and alone: on a machine with a CPU wheel at hand pip takes that one, and no
# later package then drags in the CUDA build.
$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check 'torch==2.13.0'
	$(BIN)/pip install -q --disable-pip-version-check -e '.[server,test,dev]'
	touch $@

setup: $(STAMP)  ## make the virtual environment with all that is needed

test: setup  ## pass the tests (the fast path)
	$(BIN)/python -m pytest tests

lint: setup  ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
