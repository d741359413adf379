# make demo   set everything up and run the pipeline on the embedded demo teacher
# make test   set everything up and run the tests
# make test-slurm  run the workflow on a real Slurm, started for it (root; munge, slurmctld, slurmd)
# make bench  measure what docs/performance.md states; 5 GB of disk, some minutes
# make check  set everything up and run the static checks
# make profiles  let snakemake --profile slurm find profiles/slurm
# Needs Python >= 3.11 and make; another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Rules of the workflow call `m2d`, and so find this environment's.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test test-slurm bench check format rulegraph schema profiles clean help

demo: $(STAMP)
	$(IN_VENV) snakemake --profile profiles/local all_demo
	$(IN_VENV) snakemake --profile profiles/local all_demo --report report.html
	@echo "Tables: results/tables/all_demo   Figures: results/figures/all_demo   Report: report.html"

test: $(STAMP)
	$(IN_VENV) pytest -n 2 --dist loadgroup

test-slurm: $(STAMP)
	$(IN_VENV) pytest -m slurm tests/test_slurm.py

bench: $(STAMP)
	$(IN_VENV) snakemake --profile profiles/local --quiet all -- all_demo
	$(IN_VENV) python benchmarks/all.py

check: $(STAMP)
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) snakefmt --check workflow
	$(IN_VENV) snakemake --lint

format: $(STAMP)
	$(IN_VENV) ruff check --fix .
	$(IN_VENV) ruff format .
	$(IN_VENV) snakefmt workflow

# The picture of the workflow in docs/cluster.md; needs graphviz.
rulegraph: $(STAMP)
	$(IN_VENV) snakemake --nolock --forceall --rulegraph dot -- tables >rulegraph.dot
	$(VENV)/bin/python docs/figures/rulegraph.py <rulegraph.dot \
	    | dot -Tsvg -o docs/figures/rulegraph.svg
	rm rulegraph.dot

# The config's JSON schema, for editors.
schema: $(STAMP)
	$(VENV)/bin/python -m m2d.pipeline.schema >workflow/schemas/config.schema.json

# Links the profiles to where Snakemake looks for them: then `snakemake --profile slurm` works.
profiles:
	mkdir -p "$(or $(XDG_CONFIG_HOME),$(HOME)/.config)/snakemake"
	for name in local gpu slurm; do \
	    ln -sfn "$(CURDIR)/profiles/$$name" \
	        "$(or $(XDG_CONFIG_HOME),$(HOME)/.config)/snakemake/$$name"; \
	done

clean:
	rm -rf results report.html

help:
	@sed -n 's/^# //p' Makefile | head -7

# Debian's Python makes environments without pip unless python3-venv is installed; then the pip
# outside serves the environment.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "m2d needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }
	@if test -x $(VENV)/bin/python; then :; \
	elif $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m venv --without-pip $(VENV); \
	else echo "$(PYTHON) has neither ensurepip nor pip: install python3-venv or python3-pip"; exit 1; fi
	@if test -x $(VENV)/bin/pip; then pip="$(VENV)/bin/python -m pip"; \
	else pip="$(PYTHON) -m pip --python $(VENV)/bin/python"; fi; \
	echo "Installing into $(VENV) (about 3 GB; minutes)"; \
	$$pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@
