# Thin names for the scripts. Everything runs in .venv, made on first use.
#
#   make run  [PROFILE=smoke] [ARGS="01 --remeasure"]   execute the notebooks on this machine, print their tables
#   make test [ARGS="-k records"]                       run the tests
#   make browser-test                                   Run All of every notebook in JupyterLab, in a Chromium
#   make writeup [ARGS="--year 2026"]                   render the writeup from the records there are
#   make lab                                            JupyterLab on the notebooks
#   make hooks                                          let git refuse notebooks with outputs
#   make check                                          lint, format, types, notebooks without outputs, the committed writeup

PYTHON ?= python3
PROFILE ?= laptop
BIN := .venv/bin

.PHONY: run test browser-test writeup lab hooks check setup

setup:
	@$(PYTHON) scripts/bootstrap.py

run: setup
	@$(BIN)/python scripts/run.py --profile $(PROFILE) $(ARGS)

test: setup
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

browser-test: setup
	@$(BIN)/python -m pytest tests/browser --numprocesses auto $(ARGS)

writeup: setup
	@$(BIN)/python scripts/writeup.py $(ARGS)

hooks: setup
	@$(BIN)/pre-commit install

# Lab asks for the token it prints; kernels speak to it encrypted.
lab: setup
	@$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --KernelManager.transport_encryption=auto $(ARGS) notebooks

check: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python scripts/strip_outputs.py --check && $(BIN)/python scripts/writeup.py --committed --check
