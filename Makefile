# make demo | make test | make check | make test-slow | make bench | make setup | make clean
# On a fresh machine `make demo` and `make test` need nothing before them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
export PYTHONWARNINGS ?= ignore

.PHONY: setup demo test test-slow check bench clean

setup: $(STAMP)

# The stamp is written last: an interrupted set-up is taken up again. fairseq compiles against the
# torch that is already there, so torch goes first and build isolation is off.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { rm -rf $(VENV) && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")' \
	    && $(PYTHON) -m venv $(VENV); }
	@echo "setting up $(VENV): torch and fairseq, 6 GB, some minutes"
	$(INSTALL) torch numpy cython setuptools wheel ninja
	$(INSTALL) --no-build-isolation fairseq-fixed
	$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m fixup_mt demo
	$(BIN)/python -m vision demo

# Most tests are commands in processes of their own, one thread each; a worker for a core.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup
	$(TEST)

test-slow: setup
	$(TEST) -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/vision_step.py
	$(BIN)/python benchmarks/mt_step.py
	$(BIN)/python benchmarks/mt_generate.py
	$(BIN)/python benchmarks/growth.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
