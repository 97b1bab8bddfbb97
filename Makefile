# Two commands for a fresh machine with Python 3.11 and make: `make demo` and `make test`.
# pip compiles nothing ahead (--no-compile): Python does so for the few modules that are used, which is quicker.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE # else every process would compile everything again

.PHONY: demo test lint types docs unit slurm kills clients census clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[plots]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## select, prune, finetune, evaluate and table the two shipped models
	$(BIN)/emo-select run --model demo/emo,demo/stdmoe --task demo_railway,demo_theater \
	  --keep-k full,50%,25%,12.5% --method layerwise,easy_ep,random --batch-size 16 --micro-batch-size 16 --lr 1e-3

test: lint types docs unit  ## everything but the tests on a real Slurm

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

docs: $(VENV)/installed-dev  ## the guides as a site that reads offline, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m 'not slurm and not client'

slurm: $(VENV)/installed-dev  ## the tests that start a real one-node Slurm
	$(BIN)/pytest -m slurm

kills: $(VENV)/installed-dev  ## every command killed at every change of the disk, and run again
	EMO_SELECT_EVERY_MOMENT=1 $(BIN)/pytest -s tests/moments/test_kills.py

clients: $(VENV)/installed-dev  ## the tests that ask vLLM and others, each in an environment of its own
	$(BIN)/python tests/clients/environments.py
	$(BIN)/pytest -m client -rs

census: $(VENV)/installed-dev  ## MoE families of the newest transformers; with EMO_SELECT_CENSUS=1 each in all stages
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target build/newest 'transformers<6'
	PYTHONPATH=build/newest $(BIN)/pytest -n 2 tests/census -rs

clean:
	rm -rf $(VENV) build dist *.egg-info
