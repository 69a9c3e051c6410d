# Two commands do everything on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Simulators whose packages do not go together live in environments of their own.
SIMS ?= .venv-sims
LIBERO ?= .venv-libero
# Python compiles what is imported; pip would compile all that is installed, for a minute.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

# Versions of Triton beside the tested one.
TRITONS ?= .venv-triton
VERSIONS ?= 3.6.0 3.9.0

.PHONY: demo test test-all test-triton test-sims test-libero lint docs install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[analysis,atlas,dev,docs,sae]"
	@# it pins numpy<2 and works with numpy 2
	$(BIN)/python $(PIP_INSTALL) --no-deps openpi-client==0.1.2
	touch $@

demo: install
	$(BIN)/hooked-vla demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Also the slowest.
test-all: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Kernels in the interpreter and the compiler of each version; torch itself does not ask for Triton on a CPU.
$(TRITONS)/%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRITONS)/$*
	grep -v '^triton==' constraints.txt > $(TRITONS)/$*/constraints.txt
	$(TRITONS)/$*/bin/python $(PIP_INSTALL) -c $(TRITONS)/$*/constraints.txt -e . pytest
	$(TRITONS)/$*/bin/python $(PIP_INSTALL) --no-deps triton==$*
	touch $@

test-triton: $(VERSIONS:%=$(TRITONS)/%/.installed)
	for version in $(VERSIONS); do \
	  echo "Triton $$version" && $(TRITONS)/$$version/bin/python -m pytest --override-ini=addopts= -q \
	    tests/kernels/test_interpreter.py tests/kernels/test_aot.py || exit 1; \
	done

# MetaWorld pins a MuJoCo of its own; the rest of the tested set holds
$(SIMS)/.installed: pyproject.toml constraints.txt tests/sims/constraints.txt
	$(PYTHON) -m venv $(SIMS)
	grep -v '^mujoco==' constraints.txt | cat - tests/sims/constraints.txt > $(SIMS)/constraints.txt
	$(SIMS)/bin/python $(PIP_INSTALL) -c $(SIMS)/constraints.txt -e ".[analysis,dev,aloha,metaworld,pusht]"
	touch $@

# Real episodes of MetaWorld, ALOHA and PushT.
test-sims: $(SIMS)/.installed
	HOOKED_VLA_RENDER=fast HOOKED_VLA_REQUIRED_SIMS="aloha metaworld pusht" $(SIMS)/bin/python -m pytest -rs tests/sims

$(LIBERO)/.installed: pyproject.toml constraints.txt tests/sims/constraints.txt
	$(PYTHON) -m venv $(LIBERO)
	$(LIBERO)/bin/python $(PIP_INSTALL) -c constraints.txt -c tests/sims/constraints.txt -e ".[analysis,dev,libero]"
	$(LIBERO)/bin/python $(PIP_INSTALL) --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1
	touch $@

# Real episodes of LIBERO, with HOOKED_VLA_LIBERO_ASSETS=folder of its data files; without it, what needs none.
test-libero: $(LIBERO)/.installed
	HOOKED_VLA_RENDER=fast HOOKED_VLA_REQUIRED_SIMS=libero $(LIBERO)/bin/python -m pytest -rs tests/sims/test_libero.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Generated pages, tutorials executed, and the site in site/; the variable turns off a message of the theme's makers.
docs: install
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/notebooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(SIMS) $(LIBERO) $(TRITONS) build outputs site *.egg-info
