PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(addsuffix .py,$(addprefix tests/training/test_,bad_input checkpoints failing_probes given_profiles logs \
	param_groups probe_data provenance recording resume saving scales scales_of_one schedules) \
	$(addprefix tests/profile/test_,hub rate_profile) tests/transfer/test_mapping tests/cli/test_profiles \
	tests/rates/test_outputs tests/rates/per_example/test_linear_head)

.PHONY: demo test test-lowest docs clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint .ci/constraints-lowest.txt torch
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint .ci/constraints-lowest.txt --editable ".[plot,report]" \
		pytest pytest-xdist hypothesis tqdm
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -W default $(LOWEST)

docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going examples/docs build/docs

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest
