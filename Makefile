# `make demo` shows Shoal at work, `make test` runs all of its tests; both set up what they need.
# Settings: LLM=1 (the demo's chat model), EXTRAS="…" (see scripts/setup), PYTHON=…, ARGS="…" (more
# arguments for pytest or the benchmark), TORCH_BACKEND=cpu|auto|cu128….
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PY := .venv/bin/python
VLLM := $(or $(findstring llm-gpu,$(EXTRAS)),llm-cpu)

.PHONY: help demo test check format setup lock docs bench bench-autoscaling clean

help:  ## these lines
	@grep -hE '^[a-z-]+: .*## |^[a-z-]+:  ## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | \
		while IFS=$$'\t' read -r name text; do printf '  make %-17s %s\n' "$$name" "$$text"; done

demo:  ## set up, start a cluster here, deploy the examples and ask each one something (LLM=1: chat too)
	@scripts/setup examples $(if $(LLM),$(VLLM))
	@$(PY) -m cluster demo $(if $(LLM),--llm)

test:  ## set up and run every test, those with a real cluster and with vLLM too
	@scripts/setup examples $(VLLM) dev
	@$(PY) -m pytest $(ARGS)

check:  ## set up and run what is fast: ruff, mypy, tests without a cluster
	@scripts/setup examples dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m pytest -m "not e2e and not llm" $(ARGS)

format:  ## put the code in form (ruff)
	@scripts/setup examples dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

setup:  ## only set up .venv (EXTRAS="examples llm-cpu dev" as wanted)
	@scripts/setup

lock:  ## resolve requirements/*.lock anew from pyproject.toml (UPGRADE=1: newest allowed versions)
	@scripts/setup dev
	@UPGRADE=$(UPGRADE) scripts/lock

docs:  ## write the generated pages of docs/ anew
	@scripts/setup
	@$(PY) -m dashboards.metrics > docs/metrics.md

bench:  ## measure serving side by side with other servers (see benchmarks/README.md; takes long)
	@scripts/setup examples dev
	@$(PY) -m benchmarks.serving $(ARGS)

bench-autoscaling:  ## play every policy in every recorded market (../shared/traces; takes hours)
	@scripts/setup dev
	@$(PY) -m benchmarks.autoscaling $(ARGS)

clean:  ## remove .venv and everything that can be made again
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist ./*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
