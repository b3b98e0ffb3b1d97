# `make demo` shows the main job, `make test` runs the tests. Each makes the environment it needs, in
# this folder; PYTHON=... chooses the interpreter.

PYTHON ?= python3
BASE := .venv-demo
TEST := .venv
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# In words that any Python understands.
CHECK := $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("gpukernels needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d; say for example: make PYTHON=python3.12 $(MAKECMDGOALS)" % v)'

.PHONY: demo test lint clean

demo: $(BASE)/.installed
	@$(BASE)/bin/gpukernels demo

# Triton is told to interpret when it is imported, so the kernels' own tests are a session of their own.
test: $(TEST)/.installed lint
	@$(TEST)/bin/python -m pytest --numprocesses auto
	@TRITON_INTERPRET=1 $(TEST)/bin/python -m pytest --numprocesses auto tests/kernels tests/test_autocast.py tests/test_compiled_ops.py tests/test_registration.py

lint: $(TEST)/.installed
	@$(TEST)/bin/ruff check .
	@$(TEST)/bin/ruff format --check .

# NumPy and no torch: what a machine without a GPU needs.
$(BASE)/.installed: pyproject.toml constraints.txt
	@$(CHECK)
	@$(PYTHON) -m venv $(BASE)
	@$(BASE)/bin/python $(INSTALL) --editable .
	@touch $@

$(TEST)/.installed: pyproject.toml constraints.txt
	@$(CHECK)
	@$(PYTHON) -m venv $(TEST)
	@$(TEST)/bin/python $(INSTALL) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(BASE) $(TEST) build dist *.egg-info
