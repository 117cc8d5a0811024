# make demo: train on synthetic images and print where the results are. make test: the test-suite.
# make bench: speed and memory of ARL-CNN50 beside its peers, the small version, in bench/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test bench lint

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		benchmarks/finetune_isic.py --data demo --model arl_cnn14 --img-size 128 --batch-size 16 --epochs 2

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/throughput.py --models resnet50 arl_cnn50 seresnet50 --mode infer train --batch-size 8 \
		--repetitions 3 --restarts 2 --warmup 1 --results-file bench/throughput.csv
	$(BIN)/python benchmarks/input_speed.py --images 16 --batch-size 8 --steps 3 --results-file bench/input.csv

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]'
	rm -rf $(VENV)/hub1
	$(BIN)/python -m pip install --quiet --target $(VENV)/hub1 'huggingface-hub<2'  # tested beside the newest
	touch $@
