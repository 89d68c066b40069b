# The one door. Each target is a script of the same name under .ci/, which the pipeline calls too.
#   make setup            .venv with pinned packages, spalf and the plugins, editable
#   make demo             train a small dictionary on the embedded model
#   make check            linters and fast tests, under two minutes
#   make test             linters and all tests
#   make peers            .venv/peers: SAELens and dictionary_learning, which tests/peers compares with
#   make docs bench plugins clean
# Variables: PYTHON=python3.12 (setup), ARGS="-k dual" (passed on), BENCH=name (of spalf bench; speed).
.DEFAULT_GOAL := help
.PHONY: help setup demo check test peers docs bench plugins clean

STAMP := .venv/.stamp
export PYTHON BENCH

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/setup $(wildcard plugins/*/pyproject.toml)
	@.ci/setup

demo: $(STAMP)
	@.ci/demo $(ARGS)

check: $(STAMP)
	@.ci/check $(ARGS)

test: $(STAMP)
	@.ci/test $(ARGS)

peers: $(STAMP)
	@.ci/peers

plugins: $(STAMP)
	@.ci/plugins $(ARGS)

bench: $(STAMP)
	@.ci/bench $(ARGS)

docs: $(STAMP)
	@.venv/bin/python docs/build.py $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info plugins/*/*.egg-info
	find spalf plugins tests docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
