# Everything a newcomer types. `make demo` and `make test` need only Python >= 3.11, make and a network to the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow test-long lint figures notebooks exercises clean

# Two environments would be one too many: the run packages first, the development ones (oracles, ruff) when a test or a lint asks.
$(VENV)/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("minialign needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: $(VENV)/installed          ## the main job: toy verified, a tiny GPT aligned, one table, one figure
	$(BIN)/python -m minialign demo

test: $(VENV)/installed-dev      ## the default tests, a few minutes on two cores
	$(BIN)/python -m pytest -q $(CORES)

test-slow: $(VENV)/installed-dev ## what takes longer: demo, tutorials, kill loops, runs of several processes
	$(BIN)/python -m pytest -q -m slow $(CORES)

test-long: $(VENV)/installed-dev ## what CI leaves out: more kills, more seeds, more recipes of the same kind, longer fuzzing
	$(BIN)/python -m pytest -q -m long $(CORES)

lint: $(VENV)/installed-dev      ## ruff
	$(BIN)/ruff check .

figures: $(VENV)/installed       ## the pictures of README and docs, and the numbers behind them
	$(BIN)/python -m toy.three_actions --out docs/three_actions.png
	$(BIN)/python -m toy.tiny_language --full --out docs/tiny_language.png
	$(BIN)/python -m toy.plot --numbers docs --out docs/laws.png
	for toy in frozen_lake overoptimization theory; do $(BIN)/python -m toy.$$toy --out docs/$$toy.png || exit 1; done
	rm -rf runs/figures runs/builtin-base  # a base that older code trained gives other numbers than a clean checkout
	$(BIN)/python -m minialign demo --no-toy --out runs/figures && cp runs/figures/demo.png docs/demo.png && cp runs/figures/table.json docs/demo.json

notebooks: $(VENV)/installed-dev ## execute the tutorials into tutorials/notebooks
	mkdir -p tutorials/notebooks
	for file in tutorials/[0-9]*.py; do \
		$(BIN)/jupytext --quiet --to notebook --set-kernel python3 --execute \
			--output tutorials/notebooks/$$(basename $$file .py).ipynb $$file || exit 1; \
	done
	rm -rf tutorials/notebooks/runs
	$(BIN)/python -m pytest -q tests/test_tutorials.py  # no stderr, alt texts, short lines, small files

exercises: $(VENV)/installed-dev ## the tutorials with blanks to fill in, into tutorials/exercises
	$(BIN)/python tutorials/make_exercises.py

clean:
	rm -rf $(VENV) runs
