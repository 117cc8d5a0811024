# make demo: train on synthetic images and print where the results are.
# make check: lint and the fast tests. make test: every test. make lint: ruff, mypy, import-linter.
# make test-oldest: every test with the oldest releases that pyproject.toml allows, in .venv-oldest.
# make dist: sdist and wheel, in dist/. make bench: speed and memory beside peers, the small version, in bench/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# one for which those releases have wheels
OLDEST_PYTHON ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
PYTEST := python -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo check test test-oldest lint dist bench chromium

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		benchmarks/finetune_isic.py --data demo --model arl_cnn14 --img-size 128 --batch-size 16 --epochs 2

check: lint
	$(BIN)/$(PYTEST) -m 'not slow'

test: $(VENV)/.installed chromium
	$(BIN)/$(PYTEST)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/$(PYTEST)

# a real browser for the tests of pages; as root it is installed
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	{ test "$$(id -u)" = 0 && apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium; } \
	|| echo 'no chromium to look at pages with: apt-get install chromium' >&2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

dist: $(VENV)/.installed
	$(BIN)/python -m build --no-isolation

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/throughput.py --models resnet50 arl_cnn50 seresnet50 --mode infer train --batch-size 8 \
		--repetitions 3 --restarts 2 --warmup 1 --results-file bench/throughput.csv
	$(BIN)/python benchmarks/input_speed.py --images 16 --batch-size 8 --steps 3 --results-file bench/input.csv

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]'
	rm -rf $(VENV)/hub1
	$(BIN)/python -m pip install --quiet --target $(VENV)/hub1 'huggingface-hub<2'  # tested beside the newest
	touch $@

$(OLDEST)/.installed: pyproject.toml
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	sed -n '/^dependencies/,/^\[project.urls\]/s/.*"\([a-z0-9-]*\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml \
		> $(OLDEST)/bounds.txt
	$(OLDEST)/bin/python -m pip install --constraint $(OLDEST)/bounds.txt --editable '.[app,dicom,explain,export,train]' \
		build hatchling playwright pytest pytest-timeout pytest-xdist
	touch $@
