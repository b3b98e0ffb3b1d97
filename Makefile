# `make demo` shows the main job, `make test` runs the tests. Each makes the environment it needs, in
# this folder; PYTHON=... chooses the interpreter.

PYTHON ?= python3
BASE := .venv-demo
TEST := .venv
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tests take from a millisecond to a minute: what one process has left, one that is done takes over.
PYTEST := $(TEST)/bin/python -m pytest --numprocesses auto --dist worksteal

# In words that any Python understands.
CHECK := $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("gpukernels needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d; say for example: make PYTHON=python3.12 $(MAKECMDGOALS)" % v)'

.PHONY: demo test lint clean

demo: $(BASE)/.installed
	@$(BASE)/bin/gpukernels demo

# Triton is told to interpret when it is imported, so the kernels' own tests are a session of their own. A GPU is
# hidden from both, and has its tests in a third one: fewer processes, which end where they have lost the device.
test: $(TEST)/.installed lint
	@CUDA_VISIBLE_DEVICES= $(PYTEST)
	@CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/test_autocast.py tests/test_compiled_ops.py tests/test_registration.py
	@! $(TEST)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(TEST)/bin/python -m bench.gpu_tests

lint: $(TEST)/.installed
	@$(TEST)/bin/ruff check .
	@$(TEST)/bin/ruff format --check .

# NumPy and no torch: what a machine without a GPU needs.
$(BASE)/.installed: pyproject.toml constraints.txt
	@$(CHECK)
	@$(PYTHON) -m venv $(BASE)
	@$(BASE)/bin/python $(INSTALL) --editable .
	@touch $@

# Where torch of that version is a CUDA build, it asks for a Triton whose interpreter does not run the tests: then the
# torch that goes with theirs, and NVRTC as that torch has it.
$(TEST)/.installed: pyproject.toml constraints.txt
	@$(CHECK)
	@$(PYTHON) -m venv $(TEST)
	@$(TEST)/bin/python $(INSTALL) --editable '.[test]' 2> $(TEST)/refused || { \
	    grep -q ResolutionImpossible $(TEST)/refused || { cat $(TEST)/refused; exit 1; } >&2; \
	    sed 's/^torch==.*/torch==2.11.0/; /^nvidia/d' constraints.txt > $(TEST)/constraints.txt; \
	    $(TEST)/bin/python $(subst constraints.txt,$(TEST)/constraints.txt,$(INSTALL)) --editable '.[test]'; }
	@touch $@

clean:
	rm -rf $(BASE) $(TEST) build dist *.egg-info
