# Everything a newcomer or a machine runs. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build of torch is enough here, and far smaller: set TORCH=torch where you want the default build.
TORCH ?= torch==2.13.0

.PHONY: help demo test test-slow test-gpu test-oldest test-jetpack6 test-aarch64 check-wheels check check-tensorrt dist bench-decode bench-compare bench-export bench-gpu bench-prefill bench-serve bench-forever bench-quantization bench-state docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[cpu,export,torch,compare,hub,serve,dev]'
	# TensorRT-RTX compiles without a GPU; where it cannot be installed its tests skip and say so.
	$(BIN)/pip install --quiet --editable '.[tensorrt-rtx]' || echo "tensorrt-rtx is not available here: its tests will skip"
	touch $@

demo: $(VENV)/.installed  ## export the bundled model, verify, generate, quantize (size, speed, quality), compile, compare with a Transformer
	$(BIN)/retnet-export demo --force

test: $(VENV)/.installed check  ## lint, types and tests
	$(BIN)/pytest -n auto -m "not slow"

test-slow: $(VENV)/.installed  ## the tests that take half a minute or more: the whole demo, every command on a bundle from the Hub
	$(BIN)/pytest -n auto -m slow

check: $(VENV)/.installed  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy needs the package under its name: the root folder is the package, whatever the clone is called.
	mkdir -p .cache && ln -sfn $(CURDIR) .cache/retnet_export
	cd .cache && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p retnet_export

test-gpu: $(VENV)/.installed  ## tests on an NVIDIA GPU; they skip, and say why, where there is none
	$(BIN)/pytest tests/gpu

bench-gpu: $(VENV)/.installed  ## batches and prompts on an NVIDIA GPU against its memory bus (docs/lab/gpu-batches.md)
	$(BIN)/python benchmarks/batches.py

bench-decode: $(VENV)/.installed  ## decode speed on the CPU, bundled and random 148M model
	$(BIN)/python benchmarks/decode.py

bench-export: $(VENV)/.installed  ## memory and time of exporting a random 6.7B checkpoint (needs 40 GB in TMPDIR)
	$(BIN)/python benchmarks/export_large.py --folder $${TMPDIR:-/tmp}/retnet-export-large

bench-compare: $(VENV)/.installed  ## the comparison of docs/lab/comparison.md, about three minutes a format
	for format in fp32 int8 int4; do $(BIN)/python benchmarks/compare.py $$format; done

test-oldest: $(VENV)/.installed  ## the runtime's tests on the oldest ONNX Runtime that we name; quantized weights are slow there
	$(BIN)/pip install --quiet --no-deps --upgrade --target .cache/onnxruntime-1.20 onnxruntime==1.20.1
	PYTHONPATH=.cache/onnxruntime-1.20 $(BIN)/pytest -n auto tests/graph tests/runtime tests/quantize/test_pipeline.py

test-jetpack6: $(VENV)/.installed  ## the runtime's tests with the packages that JetPack 6's Python 3.10 gets, and a check of syntax and library calls for 3.10
	$(BIN)/pip install --quiet --no-deps --upgrade --target .cache/jetpack6 onnxruntime==1.23.2 numpy==2.2.6
	$(BIN)/pip install --quiet vermin
	$(BIN)/vermin --quiet --target=3.10- --no-tips cli.py __main__.py commands runtime plan
	PYTHONPATH=.cache/jetpack6 $(BIN)/pytest -n auto tests/runtime tests/plan tests/commands/test_sessions.py

# 1.23.2 is what JetPack 6 gets; qemu 7.2 ends in a segmentation fault with 1.28 and later.
ONNXRUNTIMES ?= 1.23.2 1.26.0
AARCH64 := $(CURDIR)/.cache/aarch64
test-aarch64: $(VENV)/.installed  ## the runtime on an emulated aarch64 processor (needs qemu-user and apt); about two minutes
	for version in $(ONNXRUNTIMES); do $(BIN)/python scripts/aarch64.py --onnxruntime $$version make $(AARCH64) || exit 1; done
	RETNET_EXPORT_AARCH64=$(AARCH64) RETNET_EXPORT_AARCH64_ONNXRUNTIME=$(shell echo $(ONNXRUNTIMES) | tr ' ' ,) $(BIN)/pytest -n 2 tests/aarch64

check-wheels: $(VENV)/.installed  ## whether JetPack 6 and 7 can install every extra of the runtime from wheels
	$(BIN)/python scripts/check_wheels.py

dist: $(VENV)/.installed  ## sdist and wheel of the last commit, built twice: the same bytes, or none
	$(BIN)/pip install --quiet build
	$(BIN)/python scripts/build_dist.py

check-tensorrt: $(VENV)/.installed  ## our calls of TensorRT against its type stubs
	$(BIN)/pip install --quiet --no-deps tensorrt-stubs==10.13.0.35.1
	$(BIN)/python scripts/check_tensorrt_types.py

bench-quantization: $(VENV)/.installed  ## quality against bytes: make bench-quantization CALIBRATION=train.txt TEXT=test.txt
	$(BIN)/pip install --quiet --editable '.[compare]'
	$(BIN)/python benchmarks/quantization.py --calibration $(CALIBRATION) --text $(TEXT) -o docs/lab/figures/quantization

bench-state: $(VENV)/.installed  ## the state in fewer bytes, over a long text: make bench-state TEXT=test.txt
	$(BIN)/pip install --quiet --editable '.[compare]'
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/studies/state_precision.py --text $(TEXT) --parts text,prefill,runs,slower,heads,speed -o docs/lab/figures/state

bench-serve: $(VENV)/.installed  ## the server under load: make bench-serve BUNDLE=my.retnet
	$(BIN)/python benchmarks/serve.py $(BUNDLE)

bench-prefill: $(VENV)/.installed  ## reading prompts on the CPU: speed by chunk size, memory of both graphs
	$(BIN)/python benchmarks/prefill.py

bench-forever: $(VENV)/.installed  ## a million tokens against float64: half an hour
	$(BIN)/python benchmarks/forever.py

docs: $(VENV)/.installed  ## the web pages, in .cache/site: options of every command from the code, links checked
	$(BIN)/pip install --quiet --editable '.[docs]'
	mkdir -p .cache && ln -sfn $(CURDIR) .cache/retnet_export
	$(BIN)/typer retnet_export.cli utils docs --name retnet-export --title Commands --output docs/reference/cli.md
	$(BIN)/mkdocs build --strict

clean:  ## remove what make made
	rm -rf $(VENV) .cache build dist *.egg-info *.retnet *.comparison
