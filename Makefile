# What a person and CI both call. `make run` and `make test` need Python 3.11-3.13, git and make, and nothing else.
PYTHON ?=
CONFIG ?= configs/mnist5k.yaml
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run check test test-long setup lint docs bench lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

run: setup ## install, then audit, train, compress, export and benchmark on 5,000 digits (CONFIG=configs/….yaml for another recipe)
	@$(BIN)/cvnb run --config $(CONFIG)

check: setup ## before each commit, under three minutes: lint, house rules, changed notebooks and the tests of their packages
	@$(BIN)/python dev/check.py

test: setup ## install, then every check that CI runs
	@$(BIN)/python dev/run_tests.py

test-long: setup ## the tests marked `long`, which `make test` and CI leave out: kills in every stage, soaks, fuzzing, clusters
	@$(BIN)/python dev/run_tests.py --only long

setup: ## make .venv from requirements.lock, once (PYTHON=/path/to/python to choose the interpreter)
	@PYTHON="$(PYTHON)" sh dev/setup.sh

lint: setup ## ruff, and whether cvnb/ and README.md match their notebooks: seconds, before each commit
	@$(BIN)/python dev/run_tests.py --only lint

docs: setup ## README.md, the processed pages in _proc/, and with Quarto on PATH the site in _docs/
	@$(BIN)/python dev/docs.py

bench: setup ## measure the models of CONFIG's run again
	@$(BIN)/cvnb run benchmark --config $(CONFIG) --force

lock: setup ## resolve every dependency again and write requirements.lock
	@touch setup.py   # uv keeps what it read from it, and does not see that settings.ini changed
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --no-annotate \
	    --python-version 3.11 --override overrides.txt --extra dev --output-file requirements.lock setup.py
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python dev/serving_requirements.py

clean: ## remove what can be made again in seconds; .venv and runs stay
	@rm -rf _proc _docs build dist cvnb.egg-info .ruff_cache .pytest_cache nbs/nbdev.yml
	@find cvnb tests dev -name __pycache__ -type d -prune -exec rm -rf {} +
