# `make demo` and `make test` need Python 3.10 or later and nothing else. The first one run makes .venv and installs;
# later ones reuse it. `make test PYTHON=python3.12 VENV=../venv` chooses another Python and another place.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo-out
PYTEST_ARGS ?=

BIN = $(VENV)/bin
PACKAGING = setup.py pyproject.toml

# The folder kernels/ here must never answer an import of the unrelated distribution of that name.
export PYTHONSAFEPATH = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# A second Triton, in a folder of its own: the same kernel may fit in registers by one compiler and spill by another.
# `make other-triton` fetches it; the tests compile with it too wherever it is there.
OTHER_TRITON = 3.6.0
OTHER_TRITON_DIR = $(abspath $(VENV))/triton-$(OTHER_TRITON)
DDENGINE_OTHER_TRITON ?= $(patsubst %/.installed,%,$(wildcard $(OTHER_TRITON_DIR)/.installed))
export DDENGINE_OTHER_TRITON

.PHONY: demo test other-triton dev lint clean distclean

# One thread: on the small models' tensors here and in the tests, more of them only wait for each other.
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/.installed
	$(BIN)/ddengine demo -o $(DEMO)

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-test
	$(BIN)/pytest $(PYTEST_ARGS)

other-triton: $(OTHER_TRITON_DIR)/.installed

dev: $(VENV)/.installed-dev

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --output-format=concise .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or later is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# A stamp appears only after a whole install, so that an interrupted one is done again.
$(VENV)/.installed: $(PACKAGING) | $(BIN)/python
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-test: $(PACKAGING) | $(BIN)/python
	$(BIN)/python -m pip install -e ".[test]"
	@touch $(VENV)/.installed $@

$(OTHER_TRITON_DIR)/.installed: | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install --no-deps --only-binary=:all: --target $(@D) triton==$(OTHER_TRITON)
	@touch $@

# The links show editors and mypy the packages that setup.py maps; git and the wheel leave them out.
$(VENV)/.installed-dev: $(PACKAGING) | $(BIN)/python
	$(BIN)/python -m pip install -e ".[dev]"
	ln -sfn ../kernels ddengine/kernels
	ln -sfn ../export ddengine/export
	ln -sfn ../bench ddengine/bench
	ln -sfn ../examples ddengine/examples
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache $(DEMO)
	rm -f ddengine/kernels ddengine/export ddengine/bench ddengine/examples
	find . -path ./.git -prune -o -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

distclean: clean
	rm -rf $(VENV)
