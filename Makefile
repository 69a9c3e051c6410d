# Two commands do everything on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[sim,dev]"
	@# it pins numpy<2 and works with numpy 2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2
	touch $@

demo: install
	$(BIN)/hooked-vla demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: install
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build outputs *.egg-info
