# Every chore has its one line here; PYTHON is the environment it runs in.
PYTHON ?= python
.DEFAULT_GOAL := help
.PHONY: help test lint types doctest docs notebooks pictures bench cpython proofs menagerie outside ci

help:  ## list the chores
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test:  ## the tests, README's examples and the slow ones among them
	$(PYTHON) -m pytest -n auto --dist loadgroup -m "not long"

lint:  ## ruff
	$(PYTHON) -m ruff check

types:  ## mypy, strict
	$(PYTHON) -m mypy

doctest:  ## the examples in the docstrings
	PYTHONPATH=tests $(PYTHON) -m pytest --doctest-modules visualizer  # for tests/sitecustomize.py

docs:  ## the site of docs/ and the docstrings, in build/site; a dead link or a public name without a page is an error
	PYTHONPATH=tests NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict  # for tests/sitecustomize.py; --quiet would count no warning

notebooks:  ## run every notebook from top to bottom
	$(PYTHON) -c 'import nbclient'  # without it the test would only be skipped
	$(PYTHON) -m pytest -n auto -m "slow or long" tests/test_notebooks.py

pictures:  ## make the pictures in assets/ anew
	$(PYTHON) -m visualizer demo --out assets
	$(PYTHON) docs/gallery.py
	$(PYTHON) docs/explorer.py

bench:  ## what capturing costs
	set -e; for file in benchmarks/*.py; do $(PYTHON) $$file; done

cpython:  ## CPython's own tests under the engine, on this Python; a quarter of an hour
	$(PYTHON) tests/cpython/run.py

proofs:  ## the long proofs on every Python that is found; CHROOT=DIR adds those in DIR
	$(PYTHON) tests/proofs.py $(if $(CHROOT),--chroot $(CHROOT))

menagerie:  ## compare every architecture that eight libraries build, and write docs/menagerie.md; goes on where it was
	PYTHONPATH=tests $(PYTHON) -m menagerie $(if $(AGAIN),--again)

outside:  ## compute the figures that others published again, and write docs/outside.md
	PYTHONPATH=tests $(PYTHON) -m outside

ci:  ## what every change must pass, in fresh environments
	.ci/run
