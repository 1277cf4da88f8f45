# All targets set up .venv by themselves; PYTHON picks the interpreter (3.11 or newer).
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  command -v $$p >/dev/null && $$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)
HAS_KERNELS := import sys; sys.exit(sys.version_info < (3, 12))
NO_KERNELS := the kernels for GPUs need JAX 0.11, thus Python 3.12; set PYTHON=/path/to/python3
NO_PYTHON := sparsek needs Python 3.11 or newer with venv; set PYTHON=/path/to/python3
INSTALL := -m pip install -q --disable-pip-version-check
READY := .venv/ready

.PHONY: demo demo-text test test-compile docs clean
demo: $(READY)
	.venv/bin/sparsek demo

# Plain text, where a sliding window of the same budget is ahead.
demo-text: $(READY)
	.venv/bin/sparsek demo-text

test: $(READY)
	.venv/bin/python -m ruff check --quiet .
	.venv/bin/python -m ruff format --check --quiet .
	.venv/bin/python -m mypy --no-error-summary
	.venv/bin/python -m pytest -n 2 --dist worksteal -q

# Compiles the kernels for GPUs and TPUs that are not here. The compilers come with JAX's CUDA
# plugin, of the version of JAX itself, without the CUDA libraries, and with libtpu.
test-compile: .venv-compile/ready
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0 JAX_ENABLE_COMPILATION_CACHE=0 \
	  .venv-compile/bin/python -m pytest -q -rP \
	  tests/kernels/hopper/compile_test.py tests/kernels/ampere/compile_test.py \
	  tests/kernels/tpu/compile_test.py \
	  tests/training/plan_compile_test.py

# Builds the site of docs/ in site/.
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

.venv-docs/ready: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 2; }
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(INSTALL) -e '.[docs]'
	@touch $@

.venv-compile/ready: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(HAS_KERNELS)' 2>/dev/null || \
	  { echo "$(NO_KERNELS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/python $(INSTALL) -e '.[test]'
	version=$$(.venv-compile/bin/python -c 'import jax; print(jax.__version__)'); \
	  .venv-compile/bin/python $(INSTALL) --no-deps \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version; \
	  .venv-compile/bin/python $(INSTALL) "jax[tpu]==$$version"
	@touch $@

$(READY): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 2; }
	@echo "installing sparsek into .venv, once ..."
	$(PYTHON) -m venv .venv
	.venv/bin/python $(INSTALL) -e '.[test]'
	@touch $@

clean:
	rm -rf .venv .venv-compile .venv-docs site demo build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
