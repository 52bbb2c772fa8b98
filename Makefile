# make demo | make test | make check | make docs | make docs-links | make test-slow | make test-gpu |
# make campaign | make bench | make setup | make clean
# On a fresh machine `make demo` and `make test` need nothing before them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
export PYTHONWARNINGS ?= ignore

LOCK := .setup.lock

.PHONY: setup demo test test-slow test-gpu check docs docs-links bench campaign clean

# One set-up at a time, where the system has flock.
setup:
	@if command -v flock >/dev/null; then \
	    exec 9>$(LOCK); \
	    flock --nonblock 9 || { echo "== another set-up is running: waiting for it"; flock 9; }; \
	fi; \
	$(MAKE) --silent --no-print-directory $(STAMP)

# The stamp is written last: an interrupted set-up is taken up again. fairseq compiles against the
# torch that is already there, so torch goes first and build isolation is off.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { rm -rf $(VENV) && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")' \
	    && $(PYTHON) -m venv $(VENV); }
	@echo "== setting up $(VENV): torch and fairseq, 6 GB, some minutes"
	@echo "== 1/3 torch"
	@$(INSTALL) torch numpy cython setuptools wheel ninja
	@echo "== 2/3 fairseq, compiled where there is no wheel"
	@$(INSTALL) --no-build-isolation fairseq-fixed
	@echo "== 3/3 the project and its tools"
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup
	@echo "== demo 1/2: German to English, minutes"
	@$(BIN)/python -m fixup_mt demo
	@echo "== demo 2/2: images, minutes"
	@$(BIN)/python -m vision demo

# Most tests are commands in processes of their own, one thread each; a worker for a core.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup
	@echo "== tests: minutes, a dot for each"
	@$(TEST)

test-slow: setup
	@echo "== slow tests: many minutes, a dot for each"
	@$(TEST) -m slow

test-gpu: setup
	@echo "== tests on a CUDA device"
	@$(BIN)/python -m pytest -m gpu tests/gpu

check: setup
	@echo "== linter"
	@$(BIN)/ruff check .
	@echo "== format"
	@$(BIN)/ruff format --check .
	@echo "== spelling"
	@$(BIN)/codespell
	@echo "== types"
	@$(BIN)/mypy

SPHINX := OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet

docs: setup
	@echo "== the book: a minute"
	@$(SPHINX) docs docs/_build/html
	@echo "== docs/_build/html/index.html"

docs-links: setup
	@echo "== the book's links to the world"
	@$(SPHINX) -b linkcheck docs docs/_build/links

BENCHMARKS := vision_step mt_step mt_generate growth

bench: setup
	@for name in $(BENCHMARKS); do \
	    echo "== benchmark $$name" && $(BIN)/python benchmarks/$$name.py || exit; \
	done

# Attacks that take minutes: docs/reliability.md
CAMPAIGN := kills writes full_disk broken_files archives bad_lines

campaign: setup
	@status=0; for name in $(CAMPAIGN); do \
	    echo "== campaign $$name"; $(BIN)/python -m tests.campaign.$$name || status=1; \
	done; exit $$status

clean:
	rm -rf $(VENV) $(LOCK) build docs/_build docs/auto_gallery *.egg-info .pytest_cache .mypy_cache .ruff_cache
