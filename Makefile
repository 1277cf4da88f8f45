# Both targets set up .venv by themselves; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
READY := .venv/ready

.PHONY: demo test clean
demo: $(READY)
	.venv/bin/python -m experiments.demo

test: $(READY)
	.venv/bin/python -m flake8 sparsek kernels experiments tests
	.venv/bin/python -m pytest -n 2 --dist worksteal -q

$(READY): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "sparsek needs Python 3.11 or newer with venv; set PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv demo build dist .pytest_cache .hypothesis *.egg-info
