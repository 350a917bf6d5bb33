# Each target makes its own environment; Python 3.10 or newer and make are all that has to be there.

PYTHON ?= python3
ARGS ?=
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup reproduce real test docs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' Makefile
	@echo 'PYTHON=... chooses the interpreter, ARGS=... is passed on to reproduce, test and bench.'

reproduce: setup ## Make all runs, logs and figures; picks up where it was stopped
	.venv/bin/saenb reproduce $(ARGS)

# both baselines, and of each experiment one of the runs at its top on this model
REAL_RUNS := orthogonality/0 orthogonality/2 positional/5 contrastive/3 dual_objective/0 dual_objective/5

real: setup ## Fetch a small real model (238 MB) and make the baselines, one run of each experiment and the controls on it
	.venv/bin/saenb fetch gemma-3-270m
	.venv/bin/saenb reproduce $(REAL_RUNS) --preset gemma-3-270m $(ARGS)

test: setup ## Run the tests, notebooks included
	.venv/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

docs: setup ## Build the site into _docs/
	.venv/bin/python docs/build.py

bench: setup ## Measure saenb beside other packages, and write benchmarks/report.md; leave the machine alone meanwhile
	.venv/bin/python benchmarks/bench.py $(ARGS)

clean: ## Remove what was built, but neither runs/ nor .venv/
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

setup: $(STAMP)
	@:

$(STAMP): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "saenb needs Python 3.10 or newer, and there is no '$(PYTHON)' here: name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "saenb needs Python 3.10 or newer, and '$(PYTHON)' is older: name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "'$(PYTHON)' lacks its venv or ensurepip module: install it (on Debian the package python3-venv) and try again." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
