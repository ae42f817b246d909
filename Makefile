# make demo   set up everything and run the main job: two inferlets, Python and C, one model
# make test   set up everything and pass the tests
# make bench  measure: JSON and plots under bench/results/
# make faults kill and stop every kind of process at random, under load, for SECONDS=600
# make hostile  every attack under every profile, as root and as a plain user: a table
# make mutants  sabotages a copy of the tree in some fifty ways: the tests must notice each
# make fuzz SECONDS=600   what both sides read, and the filters, for as long as one likes

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT := The capital of France is

.PHONY: demo test check bench faults setup inferlets clean fuzz hostile mutants

demo: setup inferlets
	@echo "== inferlets/text_completion (Python)"
	@$(BIN)/piehost launch inferlets/text_completion -- --prompt "$(PROMPT)" --max-tokens 8
	@echo "== inferlets/c/text_completion (C)"
	@$(BIN)/piehost launch inferlets/c/text_completion -- --prompt "$(PROMPT)" --max-tokens 8

test: setup inferlets check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup inferlets
	$(BIN)/python -m bench

fuzz: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(MAKE) --no-print-directory -C fuzz PYTHON=$(abspath $(BIN))/python

SECONDS := 600
faults: setup inferlets
	$(BIN)/python -m tests.chaos $$(($(SECONDS) / 2))
	$(BIN)/python -m tests.chaos $$(($(SECONDS) / 2)) --model default --pause 4

hostile: setup
	$(BIN)/python -m tests.hostile

mutants: setup inferlets
	$(BIN)/python -m tests.mutants

inferlets:
	@$(MAKE) --no-print-directory -C bindings/c
	@$(MAKE) --no-print-directory -C inferlets/c
	@$(MAKE) --no-print-directory -C inferlets/three_languages

setup: $(VENV)/installed

# The stamp is newer than what it was made from, so a second `make` starts at once.
$(VENV)/installed: constraints.txt pyproject.toml bindings/python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "piehost needs Python 3.11 or newer; try: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "cannot make a virtualenv; on Debian try: apt install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e bindings/python -e '.[dev,bench]'
	@touch $@

clean:
	rm -rf $(VENV) bindings/c/build fuzz/build inferlets/c/*/build inferlets/three_languages/build
