# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRA  ?= cpu
# uv does not read pip's configuration; where pip knows a folder of wheels, hand it over. Elsewhere uv finds
# PyTorch's CPU builds by itself.
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
ifneq ($(FIND_LINKS),)
export UV_FIND_LINKS := $(FIND_LINKS)
else ifeq ($(EXTRA),cpu)
export UV_TORCH_BACKEND := cpu
endif
export OMP_NUM_THREADS ?= 1
# A demo that has been made is kept: RESUME=1 goes on with it, OVERWRITE=1 removes it and begins anew.
AGAIN := $(strip $(if $(RESUME),--resume) $(if $(OVERWRITE),--overwrite))
# make finds the command in its environment; whoever types what a run names next has to enter that first.
next_time = @echo "\`. $(BIN)/activate\` puts the command cola_ray on the path of your shell"
HAS_RUN = has a run already: RESUME=1 goes on with it, OVERWRITE=1 removes it and begins anew
kept = $(if $(AGAIN),,$(if $(wildcard outputs/$(1)/run.json),@echo "outputs/$(1) $(HAS_RUN)"; exit 2))

.PHONY: setup games evals docs demo demo-agent reproduce test test-slow lint bench gpu chaos results lock clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready-$(EXTRA)  ## create .venv and install everything, pinned (EXTRA=cpu or gpu); safe to repeat

$(VENV)/.ready-$(EXTRA): requirements/$(EXTRA).txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --no-deps -r requirements/$(EXTRA).txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

games: setup  ## add TextWorld and Jericho (GPL-2.0), for the text adventures
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements/games.txt

evals: setup  ## add sentence encoders, self-BLEU and the evaluation harness
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements/evals.txt -c requirements/$(EXTRA).txt

docs: setup  ## build docs/ as a site, to outputs/site/index.html
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements/docs.txt -c requirements/$(EXTRA).txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/site/mkdocs.yml
	@echo "outputs/site/index.html; to search in it, $(PYTHON) -m http.server --directory outputs/site"

demo: setup  ## train the tiny preset from nothing: base, latent actions, policy, RL; about five minutes on 2 cores
	$(call kept,demo)
	$(BIN)/cola_ray rl --preset tiny --output-dir outputs/demo $(AGAIN)
	$(next_time)

demo-agent: setup  ## the same for a multi-turn agent: Twenty Questions, ArCHer's critic over utterances
	$(call kept,demo-agent)
	$(BIN)/cola_ray agent --preset tiny --output-dir outputs/demo-agent $(AGAIN)
	$(next_time)

reproduce: evals  ## the papers' matrix with the tiny preset, to outputs/reproduce/report/index.html; under three hours
	$(BIN)/cola_ray reproduce --preset tiny --output-dir outputs/reproduce

test: setup  ## unit tests, then parity tests, then system tests, two at a time
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/parity
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/system

test-slow: setup  ## learning curves over three seeds and kill tests
	$(BIN)/python -m pytest -q -m slow --timeout 5400 tests

lint: setup  ## ruff, mypy, and the floor plan
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## timings as ratios, written to docs/results/bench.json
	$(BIN)/python benchmarks/run.py

gpu: setup  ## what a GPU has to show: correctness, speed, memory against the plan (with EXTRA=gpu); goes on where it was stopped
	$(BIN)/python benchmarks/gpu.py

chaos: setup  ## kill and stop every kind of process of running jobs; MINUTES=30 limits a call, trials add up
	$(BIN)/python benchmarks/chaos.py $(if $(MINUTES),--minutes $(MINUTES))

results: setup  ## update the tables in docs/*.md from docs/results/*.json
	$(BIN)/python benchmarks/record.py

lock:  ## compile the pinned requirements of both machines
	$(BIN)/uv pip compile -q --python $(BIN)/python --no-annotate --no-header --no-emit-index-url --no-emit-find-links --extra cpu --extra dev --override requirements/cpu-overrides.txt pyproject.toml -o requirements/cpu.txt
	env -u UV_TORCH_BACKEND -u UV_FIND_LINKS $(BIN)/uv pip compile -q --python $(BIN)/python --no-annotate --no-header --no-emit-index-url --no-emit-find-links --extra gpu --extra dev pyproject.toml -o requirements/gpu.txt

clean:  ## remove the environment; outputs/ stays
	rm -rf $(VENV) build *.egg-info
