# From a fresh clone, with Python 3.11 or newer: `make serve`, `make test`. CONTRIBUTING.md has the rest.
PYTHON ?= python3
BIN := .venv/bin
DEMO := gemma-3-270m
PACKAGES := gateway plugins engine_native kernels router_policies
ARGS ?=

.PHONY: help serve test check lint format docs conformance kernels e2e soak bench bench-engine set-up set-up-dev model clean

help: ## show this
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

serve: set-up ## serve the demo model on http://127.0.0.1:8000/v1 (ARGS=... go to forebay serve)
	@$(BIN)/forebay serve $(ARGS)

test: set-up-dev model ## run the tests, all but those of `make kernels` and `make e2e` (ARGS=... go to pytest)
	$(BIN)/pytest -q --ignore=tests/kernels $(ARGS)

kernels: set-up-dev ## run the operators' tests: those in Triton by its interpreter, and compiled for Hopper
	$(BIN)/pytest -q tests/kernels $(ARGS)

check: lint test kernels ## what must pass before a change is merged

lint: set-up-dev ## formatting, ruff, import contracts, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	MYPYPATH=benchmarks:benchmarks/gpu:scripts $(BIN)/mypy $(PACKAGES) benchmarks scripts

format: set-up-dev ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: set-up-dev ## write what of docs/ comes from types, from reports, and from runs of the engine's scheduler
	$(BIN)/python scripts/generate_config_docs.py
	$(BIN)/python scripts/generate_backends_doc.py
	$(BIN)/python scripts/draw_engine.py

conformance: set-up-dev ## put the conformance kit before all fakes, and write down what it finds
	$(BIN)/python scripts/examine_fakes.py $(ARGS)
	$(BIN)/python scripts/generate_backends_doc.py

e2e: set-up-dev model ## install real servers and clients if need be, and drive them through Forebay
	scripts/backends/backends.sh install model llamacpp vllm triton clients
	$(BIN)/pytest -m e2e -v tests/e2e $(ARGS)

soak: set-up-dev ## 10,000 requests with aborts through the native engine; prints what it found
	$(BIN)/pytest -m soak -s -q tests/engine/test_soak.py $(ARGS)

bench: set-up-dev ## measure the relay beside Envoy and vllm-router
	scripts/backends/backends.sh install envoy vllm-router
	$(BIN)/python benchmarks/relay.py $(ARGS)

bench-engine: set-up-dev model ## measure the native engine beside vLLM and llama.cpp
	scripts/backends/backends.sh install model llamacpp vllm
	$(BIN)/python benchmarks/engine_cpu.py $(ARGS)

set-up:
	@$(PYTHON) scripts/set_up.py

set-up-dev:
	@$(PYTHON) scripts/set_up.py --dev

model: set-up
	@$(BIN)/forebay model pull $(DEMO) >/dev/null

clean: ## remove the environment and all caches in this folder (not models and backends)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
