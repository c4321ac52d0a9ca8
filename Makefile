# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRAIN := $(BIN)/python -m mfm_dist.train --launch configs/accelerate/cpu_zero2.yaml
RUN := runs/quickstart
SEVERAL := tests/distributed tests/end_to_end tests/faults tests/slurm
TORCH := $(addprefix tests/unit/,models methods distributed checkpoint test_train_module.py test_optim.py test_encode_once.py)
BIN26 := $(VENV)-torch26/bin

.PHONY: help install quickstart quickstart-source-only scenes lint test test-torch26 campaign slurm-cluster clean

help:
	@echo "make quickstart   environment, scenes, a distributed training run, evaluation, report (minutes on 2 cores)"
	@echo "make test         environment, lint, all tests"
	@echo "make test-torch26 the tests of what torch computes, with torch 2.6 in $(VENV)-torch26"
	@echo "make install      the virtual environment in $(VENV) alone (VENV=path to choose another)"
	@echo "make scenes       the embedded data set in data/scenes alone"
	@echo "make lint         ruff and mypy alone"
	@echo "make campaign     the proofs that take hours: all stages and world sizes, random kills, live faults, damaged shards, hostile inputs, soak, Slurm"
	@echo "make slurm-cluster  a private Slurm of two nodes on this machine, to try slurm/ by hand"

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

scenes: $(STAMP)
	$(BIN)/python -m mfm_dist.shards make scenes --output data/scenes --height 128 --width 256

quickstart: $(STAMP)
	$(TRAIN) --config configs/quickstart.yaml
	$(BIN)/python -m mfm_dist.evaluate --run $(RUN)
	$(BIN)/python -m mfm_dist.report $(RUN)
	@echo
	@$(BIN)/python tools/quickstart_summary.py $(RUN)

quickstart-source-only: $(STAMP)
	$(TRAIN) --config configs/quickstart.yaml method.name=source_only mfm.enabled=false run.folder=runs/source_only

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests of single processes two at a time; those that start several, or a cluster, one after another.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not campaign" $(SEVERAL:%=--ignore=%) -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SEVERAL) -m "not campaign"

# The tests of what torch computes with the oldest torch that setup.py allows, in an environment of its own.
test-torch26:
	test -x $(BIN26)/python || $(PYTHON) -m venv $(VENV)-torch26
	grep -vE '^torch(vision)?==' constraints.txt > $(VENV)-torch26/constraints.txt
	$(BIN26)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-torch26/constraints.txt 'torch==2.6.*' 'torchvision==0.21.*' -e '.[test]'
	OMP_NUM_THREADS=1 $(BIN26)/python -m pytest $(TORCH) -m "not campaign" -n 2 --dist loadfile

# One after another; each appends its record, and goes on where an interrupted campaign stopped.
campaign: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m campaign --record docs/benchmarks/campaign_tests.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.scale
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.kills
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.damaged_shards
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.hostile_inputs
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.live_faults
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.decode_speed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign.slurm_rounds
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file configs/accelerate/cpu_zero3.yaml -m tests.campaign.large_state

slurm-cluster: $(STAMP)
	$(BIN)/python -m tests.slurm.cluster

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
