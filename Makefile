# Each target is a virtual environment, an install, and one command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
PARALLEL = -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-avx2 test-oldest check docs clean

demo: $(VENV)/.installed
	$(BIN)/farout demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(PARALLEL) $(PYTEST_ARGS)

# Matrix libraries choose kernels by the processor's instruction set: with these, any x86 machine computes as an older one.
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-avx2: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "numerics and not slow" $(PARALLEL)

# The lowest versions that pyproject.toml allows, on the lowest Python; `test` has the newest.
test-oldest: $(OLDEST)/.installed-dev
	$(OLDEST)/env/bin/python -m pytest -m "not slow" $(PARALLEL)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The generated pages, then the site in site/; warnings are errors.
docs: $(VENV)/.installed-dev
	$(BIN)/python tools/make_commands.py
	$(BIN)/python tools/make_tutorials.py
	$(BIN)/python tools/build_site.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# pip cannot choose the lowest versions; uv can. It downloads Python 3.11 where there is none.
$(OLDEST)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)/uv
	$(OLDEST)/uv/bin/python -m pip install --quiet "uv>=0.8"
	$(OLDEST)/uv/bin/uv venv --quiet --clear --python 3.11 $(OLDEST)/env
	$(OLDEST)/uv/bin/uv pip install --quiet --python $(OLDEST)/env --resolution lowest-direct -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build site dist .pytest_cache .mypy_cache .ruff_cache farout-demo
