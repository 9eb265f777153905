# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv themselves.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test fuzz zoo conformance bench bench-retrieval gpu lint types docs figures experiments wheel clean

# The first of these that is there; name another with `make test PYTHON=/path/to/python`.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,\
            $(shell command -v $(name))))
ARGS ?=

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' Makefile
	@echo 'More arguments travel in ARGS: make demo ARGS="seed=1", make test ARGS="-k store".'

demo: .venv/.installed ## train a small model and trace its images to their training examples
	@.venv/bin/dmin demo $(ARGS)

test: .venv/.installed ## run the tests
	@.venv/bin/pytest -n auto --dist worksteal $(ARGS)

fuzz: .venv/.installed ## kill 200 writers, flip every bit of the heads of a store's files; writes docs/fuzz.md (an hour)
	@mkdir -p outputs && rm -f outputs/fuzz.jsonl
	@DMIN_FUZZ=5 DMIN_FUZZ_NOTES=outputs/fuzz.jsonl .venv/bin/pytest -n auto --dist worksteal \
	  tests/store/test_store_crashes.py tests/store/test_store_catalog.py tests/store/test_store_fuzz.py \
	  tests/attribution/test_search_certified.py $(ARGS)
	@.venv/bin/python tests/fuzz.py docs/fuzz.md outputs/fuzz.jsonl

zoo: .venv/.installed ## hold 3,300 random layers and networks to autograd; writes docs/zoo.md (minutes)
	@mkdir -p outputs && rm -f outputs/zoo.jsonl
	@DMIN_FUZZ=20 DMIN_FUZZ_NOTES=outputs/zoo.jsonl .venv/bin/pytest -n auto tests/gradients/test_capture_random.py \
	  tests/gradients/test_zoo.py tests/gradients/test_layers.py -k any $(ARGS)
	@.venv/bin/python tests/fuzz.py docs/zoo.md outputs/zoo.jsonl

conformance: .venv/.installed ## run every test of a family over all, and write docs/conformance.md (minutes)
	@DMIN_CONFORMANCE=1 .venv/bin/pytest -n auto tests/models tests/collect/test_fsdp.py $(ARGS)
	@PYTHONPATH=tests .venv/bin/python -m models.conformance

bench: .venv/.installed ## measure collecting beside plain training (40 minutes; goes on if stopped)
	@.venv/bin/python experiments/bench/run.py $(ARGS)

bench-retrieval: .venv/.installed ## measure every way to search (an hour, 25 GB of disk; goes on if stopped)
	@.venv/bin/python experiments/retrieval/run.py $(ARGS)

gpu: .venv/.installed ## run the tests and benchmarks that need a GPU (an hour; goes on if stopped)
	@.venv/bin/python experiments/bench/gpu.py $(ARGS)

lint: .venv/.installed ## check style, types and the floors of the import graph
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

types: .venv/.installed ## count the public names whose types every checker sees, by pyright
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'pyright>=1.1.400'
	@.venv/bin/python tests/public_types.py

docs: .venv/.installed ## build the site into outputs/site: run the notebooks, check every link (five minutes)
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 nice .venv/bin/mkdocs build --quiet
	@.venv/bin/python docs/site/check.py outputs/site

figures: .venv/.installed ## print the figures of the structure beside their limits
	@.venv/bin/python tests/structure.py

experiments: ## list the experiments: question, time, hardware, command
	@$(PYTHON) experiments

wheel: .venv/.installed ## build the source distribution and the wheel into dist/
	@rm -rf dist
	@.venv/bin/python -m build --no-isolation

clean: ## remove .venv, dist/ and the caches; outputs/ stays
	rm -rf .venv dist build .*_cache .hypothesis
	find dmin tests experiments -name __pycache__ -prune -exec rm -rf {} +

# The stamp is made last, so an interrupted installation starts again.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dmin needs Python 3.11 or newer; found: $$($(or $(PYTHON),false) --version 2>/dev/null \
	|| echo none). Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing dmin and what it needs into .venv: once, one to five minutes, 2.5 GB, or 6 GB with CUDA ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[dev,lora,data,faiss,slurm,joblib,tensorboard,serve,video]'
	@touch $@
