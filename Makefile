# A fresh machine needs Python 3.11 or newer and make; everything else goes into .venv, made on first use.
#   ARGS="..."         more arguments for the command a target runs: make test ARGS="-k solvers -x"
#   WORKERS=N          tests at once, by default 2; each takes one core and up to 3 GiB of memory
#   ONLY=NAME          make check: only the tests of one folder, such as kernels, rewards, recipe
#   RUN=DIRECTORY      where make train puts its run
#   PYTHON=...         the Python that .venv is made from
#   TORCH_INDEX=URL    one more package index, such as that of PyTorch's builds for CPU or for one CUDA version
#   PIP_ARGS="..."     anything else for pip

PYTHON      ?=
TORCH_INDEX ?=
PIP_ARGS    ?=
ARGS        ?=
ONLY        ?=
WORKERS     ?= 2
RUN         ?= runs/spelling_cpu-$(shell date +%Y%m%d-%H%M%S)

# Relative paths throughout, so that the checkout may lie in a directory with spaces.
BIN       := .venv/bin
PY        := $(BIN)/python
INSTALLED := .venv/.installed
# What runs inside the environment finds the tools that it brings, such as ninja.
INSIDE    := PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train check test slow families portable lint types wheel clean

help:                ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo "Settings:"
	@sed -n 's/^#   /  /p' Makefile

train: $(INSTALLED)  ## teach a small FLUX to spell, on this machine's CPU, and show before and after
	@$(INSIDE) $(BIN)/ngrpo train spelling_cpu --log.output-dir "$(RUN)" $(ARGS)

# Python may keep what it compiles: pytest would rewrite every test's assertions anew each time, for six seconds.
PYTEST   := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(INSIDE) $(PY) -m pytest
PARALLEL := --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
# Of tests that ARGS choose, a lane may hold none, which pytest calls an error, 5.
OR_NONE   = $(if $(ARGS)$(ONLY),|| [ $$? = 5 ])
WING      = $(or $(wildcard tests/train/$(ONLY) tests/$(ONLY) tests/test_$(ONLY).py),$(error ONLY=$(ONLY): tests has \
no folder of that name))

check: lint types    ## lint, types and the light tests; ONLY=rewards (kernels, ...): one folder's tests
	@$(PYTEST) $(PARALLEL) -m 'light and not slow' $(if $(ONLY),$(WING)) $(ARGS) $(OR_NONE)

test: $(INSTALLED)   ## run the tests, lane by lane: the light ones first
	@$(PYTEST) $(PARALLEL) $(ARGS)

slow: $(INSTALLED)   ## run the tests that make test leaves out: bugs planted in the kernels, generated code
	@$(PYTEST) $(PARALLEL) -m slow $(ARGS)

families: $(INSTALLED) ## run the tests of all families of models (docs/models.md), and whole models on an absent GPU
	@$(PYTEST) $(PARALLEL) -m 'families or not families' tests/train/models/test_conformance.py \
	    tests/train/models/test_family_runs.py tests/train/models/test_family_ranks.py \
	    tests/train/models/test_family_commands.py $(ARGS)
	@$(PYTEST) $(PARALLEL) -m families tests/fake_gpu $(ARGS)

# Triton's interpreter computes in numpy, which these variables do not reach; how a run ends is no matter of rounding.
portable: $(INSTALLED) ## run the kernels' and the distributed tests with the smallest instruction set
	@ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) $(PARALLEL) -k "not triton and not killed" \
	    tests/kernels tests/train/run/test_distributed.py $(ARGS)

lint: $(INSTALLED)   ## ruff
	@$(PY) -m ruff check $(ARGS) .

types: $(INSTALLED)  ## mypy
	@$(PY) -m mypy $(ARGS)

wheel: $(INSTALLED)  ## build dist/*.whl
	@$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:               ## remove .venv, caches and builds; runs/ stays
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python that is new enough and can make environments. Remade whenever pyproject.toml or
# constraints.txt changes.
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(PY) -c 'import pip; $(SUITABLE)' 2>/dev/null; then \
	    for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3) ""; do \
	        if [ -n "$$python" ] && "$$python" -c '$(SUITABLE)' 2>/dev/null; then break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "Found no Python >= 3.11 that has its venv module (on Debian and Ubuntu: python3-venv)." >&2; \
	        echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	    fi; \
	    echo "Making .venv with $$("$$python" --version)"; \
	    "$$python" -m venv --clear .venv || exit 1; \
	fi
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null; then \
	    echo "No NVIDIA GPU here. If pip picks a CUDA build of torch (some GB), TORCH_INDEX can point at CPU builds."; \
	fi
	@echo "Installing ngrpo and its tools into .venv (minutes, the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") $(PIP_ARGS) --editable ".[dev]"
	@touch $@
