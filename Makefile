# Works on a fresh machine with Python 3.11 or later and make: each target does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-hardware lint table clean
.DEFAULT_GOAL := demo

# torch first: the pinned version has a CPU build, and what follows must not replace it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/autocompress search --model digits-cnn --data digits --target x86/openvino \
	    --objectives accuracy latency size --trials 16 --workers 2 --out runs/demo

# Two at a time: most tests wait for one core. Those of one file share their fixtures.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600

# What needs the TPU compiler (1.2 GB) and the FPGA tools; with iverilog and qemu-user from the system where they are.
test-hardware: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tpu,fpga]'
	$(BIN)/python -m pytest -m slow --timeout 3600 $(wildcard tests/test_hardware_*.py)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
