PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(addsuffix .py,$(addprefix tests/training/test_,bad_input checkpoints failing_probes given_profiles logs \
	param_groups probe_data provenance recording resume saving scales scales_of_one schedules) \
	$(addprefix tests/profile/test_,hub rate_profile) tests/transfer/test_mapping tests/cli/test_profiles \
	tests/rates/test_outputs tests/rates/per_example/test_linear_head tests/repository/test_version)

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest lint format docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## Tune a learning rate at LoRA rank 4 and use it at rank 64 (about 5 minutes)
	$(BIN)/python examples/demo.py

test: $(VENV)/installed  ## Run everything that a change must pass, with the pinned versions
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The `test` extra is not installed: some of its libraries need newer versions than the lowest ones.
test-lowest:  ## Run the core's tests with the lowest supported versions (PYTHON=python3.10 for the lowest Python)
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint .ci/constraints-lowest.txt torch
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint .ci/constraints-lowest.txt --editable ".[plot,report]" \
		pytest pytest-xdist hypothesis tqdm
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -W default $(LOWEST)

lint: $(VENV)/installed  ## Check style, format and types
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

format: $(VENV)/installed  ## Format the code and apply the linter's safe fixes
	$(BIN)/python -m ruff check --fix-only
	$(BIN)/python -m ruff format

docs: $(VENV)/installed  ## Build the documentation into build/docs; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going examples/docs build/docs

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:  ## Remove the virtual environments
	rm -rf $(VENV) $(VENV)-lowest
