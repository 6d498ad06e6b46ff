# make train    set up, train the quickstart model, write samples and a probability page
# make test     set up, run the tests that cover each claim once; minutes
# make test-all set up, run every test: more kills, meshes, sizes, hostile input
# make help     this text, and the settings
#
# Settings, as in `make train PYTHON=python3.12`:
#   PYTHON        the Python that .venv is made with; else the first of 3.13, 3.12, 3.11 that works
#   ACCELERATOR   cuda, tpu or cpu; else what is found on this machine
#   VENV          where everything is installed, .venv
#   CONFIG, RUN   what `make train` trains, and where, configs/quickstart.toml and runs/quickstart
#   TESTS         what `make test` runs, as in TESTS="tests/test_loss.py -x"
#
# All install only what is missing, and can be interrupted and run again.

VENV = .venv
CONFIG = configs/quickstart.toml
RUN = runs/quickstart
TESTS = tests

# Which device.
#
# An NVIDIA GPU answers nvidia-smi, or shows its device file where only the driver is installed.
HAS_CUDA = nvidia-smi -L 2>/dev/null | grep -q '^GPU' || test -e /dev/nvidia0
# A TPU is a PCI device of Google's (0x1ae0) with one of the numbers that JAX itself looks for in
# jax/_src/hardware_utils.py; Google's network card has the same maker and another number.
TPU_NUMBERS = 0x0027|0x0056|0x005e|0x0062|0x0063|0x006f|0x0076|0x0083|0x007c
HAS_TPU = test -n "$$TPU_NAME" || test -e /dev/accel0 || ( \
    for device in /sys/bus/pci/devices/*; do \
        grep -qs 0x1ae0 $$device/vendor && grep -qsE '$(TPU_NUMBERS)' $$device/device && exit 0; \
    done; exit 1 )

ACCELERATOR := $(shell \
    if $(HAS_CUDA); then echo cuda; elif $(HAS_TPU); then echo tpu; else echo cpu; fi)

ifeq ($(filter $(ACCELERATOR),cuda tpu cpu),)
    $(error ACCELERATOR=$(ACCELERATOR): expected cuda, tpu or cpu)
endif

# The extra of pyproject.toml that brings the matching JAX; plain JAX runs on the CPU.
JAX_EXTRA = $(filter-out cpu,$(ACCELERATOR))
COMMA = ,

# Which Python.
#
# Each is run, not only looked up: a version manager's shim can exist and still fail. One that
# cannot make a virtual environment is passed over (Debian's python3 without python3-venv).
CAN_BE_USED = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON = $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
    $$python -c '$(CAN_BE_USED)' 2>/dev/null && echo $$python && break; done)

.PHONY: train test test-all test-thorough venv clean help

train: $(VENV)/installed-train-$(ACCELERATOR)
	$(VENV)/bin/python train.py $(CONFIG) --run.dir $(RUN)
	$(VENV)/bin/python sample.py $(RUN) --num-samples 2 --max-new-tokens 255 \
	    --probs $(RUN)/samples.jsonl --html $(RUN)/samples.html
	@echo
	@echo "The probability of every token: open $(RUN)/samples.html in a browser."
	@echo "How it learnt, with its curves: open $(RUN)/report.html."

PYTEST = $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder

test: $(VENV)/installed-test-$(ACCELERATOR)
	$(PYTEST) -m "not thorough" $(TESTS)

test-all: $(VENV)/installed-test-$(ACCELERATOR)
	$(PYTEST) $(TESTS)

# What `make test` leaves out.
test-thorough: $(VENV)/installed-test-$(ACCELERATOR)
	$(PYTEST) -m thorough $(TESTS)

venv: $(VENV)/bin/python

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf *.egg-info
	@echo "Runs stay in runs/, prepared corpora in ~/.cache/llm."

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Installing.
#
# A stamp for each purpose and device, so that a GPU added later is noticed; newer than pyproject.toml
# means nothing to do.
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -qq --root-user-action ignore

$(VENV)/installed-train-%: $(VENV)/bin/python pyproject.toml
	@echo "Installing for $* into $(VENV); the first time takes a few minutes."
	@$(PIP) --editable .$(if $(JAX_EXTRA),'[$(JAX_EXTRA)]')
	@touch $@

$(VENV)/installed-test-%: $(VENV)/bin/python pyproject.toml
	@echo "Installing what the tests need, for $*, into $(VENV); the first time takes a few minutes."
	@$(PIP) --editable '.[test$(if $(JAX_EXTRA),$(COMMA)$(JAX_EXTRA))]'
	@touch $@

$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { \
	    echo "No usable Python found: tried python3.13, python3.12, python3.11, python3 and python." >&2; \
	    echo "Expected Python 3.11, 3.12 or 3.13 that can make virtual environments." >&2; \
	    echo "Debian and Ubuntu: apt install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -c '$(CAN_BE_USED)' || { \
	    echo "PYTHON=$(PYTHON) cannot be used: expected Python 3.11, 3.12 or 3.13 with the modules venv" >&2; \
	    echo "and ensurepip. Debian and Ubuntu: apt install python3-venv." >&2; \
	    exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
