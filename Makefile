# make demo   set everything up and run the pipeline on the embedded demo teacher
# make test   set everything up and run the tests
# make test-slurm  run the workflow on a real Slurm, started for it (root; munge, slurmctld, slurmd)
# make test-transformers4  read students with transformers 4 too, in an environment of its own
# make test-oldest  run a core of the tests with the oldest dependencies that pyproject.toml allows
# make test-serving  run every family's student in vLLM and llama.cpp, in environments of their own
# make bench  measure what docs/performance.md states; 5 GB of disk, some minutes
# make fuzz   3,000 hostile files for every command, an hour; make kills: 700 kills of every stage
# make arguments  bad values of every option; make faults: full disks, limits and signals (root)
# make check  set everything up and run the static checks
# make profiles  let snakemake --profile slurm find profiles/slurm
# make docs   build the documentation into site/
# Needs Python >= 3.11 and make; another interpreter: make demo PYTHON=python3.12
# Without a GPU, the small wheel of torch: make demo TORCH=cpu

PYTHON ?= python3
VENV := .venv
TRANSFORMERS4 ?= .venv-transformers4
OLDEST ?= .venv-oldest
# TORCH=cpu takes torch's CPU wheel; without it, pip's choice, which may be CUDA's of some GB.
CPU_WHEELS := https://download.pytorch.org/whl/cpu
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url $(CPU_WHEELS))
TORCH_VERSION := 2.13.0
STAMP := $(VENV)/.installed
# Rules of the workflow call `m2d`, and so find this environment's.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test test-slurm test-transformers4 test-oldest \
    test-serving bench fuzz kills arguments faults check format rulegraph schema lock docs profiles clean help

demo: $(STAMP)
	$(IN_VENV) m2d forkserver snakemake --profile profiles/local --logger m2d -- all_demo
	$(IN_VENV) snakemake --profile profiles/local --quiet all --report report.html -- all_demo
	@echo "Tables: results/tables/all_demo   Figures: results/figures/all_demo   Report: report.html"

test: $(STAMP)
	$(IN_VENV) pytest -n 2

fuzz: $(STAMP)
	$(IN_VENV) python -m tests.fuzz

kills: $(STAMP)
	$(IN_VENV) python -m tests.kills

arguments: $(STAMP)
	$(IN_VENV) python -m tests.arguments

faults: $(STAMP)
	$(IN_VENV) python -m tests.faults

test-slurm: $(STAMP)
	$(IN_VENV) pytest -m slurm tests/test_slurm.py

# Its own environment, since no two versions of transformers go together. About 1 GB.
test-transformers4: $(STAMP)
	test -x $(TRANSFORMERS4)/bin/python || $(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/pip install -q torch==2.13.0 transformers==4.57.6 accelerate
	$(IN_VENV) TRANSFORMERS4=$(TRANSFORMERS4)/bin/python pytest -m transformers4 tests/test_transformers4.py

# The lower bounds of m2d's own dependencies, exactly, in an environment of their own, where `pip
# install m2d` is all that m2d has. torch 2.11 is CUDA's build, of some GB, unless TORCH=cpu.
CORE := scaling scoring grouping plan loss experts stream schemes refit_math
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	    print(*p["project"]["dependencies"], sep="\n")' | sed 's/>=/==/' >$(OLDEST)/oldest.txt
	$(OLDEST)/bin/pip install -q $(INDEX) -r $(OLDEST)/oldest.txt -e . \
	    pytest pytest-timeout pytest-xdist hypothesis
	$(OLDEST)/bin/python -m pytest $(CORE:%=tests/test_%.py)

# Downloads some GB into build/serving; an hour on two cores. Writes the table of docs/serving.md.
test-serving: $(STAMP)
	$(IN_VENV) python tests/serving/run.py build/serving --table $(if $(INDEX),--index $(CPU_WHEELS))

bench: $(STAMP)
	$(IN_VENV) snakemake --profile profiles/local --quiet all -- all_demo
	$(IN_VENV) python benchmarks/all.py

check: $(STAMP)
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) lint-imports --no-cache --no-logo
	$(IN_VENV) snakefmt --check workflow
	$(IN_VENV) python workflow/scripts/lint.py

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

# The exact versions, anew: of what uv finds newest, with torch's CPU wheel, whose pin holds for
# all of its builds. Needs uv.
lock:
	echo "torch==$(TORCH_VERSION)+cpu" >torch.txt
	uv pip compile -q pyproject.toml --extra dev --extra docs --python-version 3.11 --no-header \
	    --no-annotate --upgrade --constraint torch.txt --index-strategy unsafe-best-match \
	    --extra-index-url $(CPU_WHEELS) -o requirements.lock
	sed -i 's/+cpu$$//' requirements.lock
	rm torch.txt

docs: $(STAMP)
	$(IN_VENV) mkdocs build --strict

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
	@sed -n 's/^# //p' Makefile | head -13

# Debian's Python makes environments without pip unless python3-venv is installed; then the pip
# outside serves the environment.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "m2d needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }
	@if test -x $(VENV)/bin/python; then :; \
	elif $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m venv --without-pip $(VENV); \
	else echo "$(PYTHON) has neither ensurepip nor pip: install python3-venv or python3-pip"; exit 1; fi
	@if test -x $(VENV)/bin/pip; then pip="$(VENV)/bin/python -m pip"; \
	else pip="$(PYTHON) -m pip --python $(VENV)/bin/python"; fi; \
	echo "Installing into $(VENV) (about 3 GB; minutes)"; \
	$$pip install --disable-pip-version-check -q $(INDEX) -r requirements.lock -e .
	touch $@
