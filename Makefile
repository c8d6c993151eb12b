# Everything runs in ./.venv, made on first use from constraints.txt. PYTHON picks the interpreter (>= 3.11).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export PIP_NO_INPUT := 1

.PHONY: demo test sim check protos bench clean
demo: $(VENV)/demo$(if $(TORCH),-torch) ; $(BIN)/python -m bench.demo $(ARGS)
test: $(VENV)/dev ; $(BIN)/python -m pytest $(ARGS)
sim: $(VENV)/dev ; $(BIN)/python -m tests.sim $(ARGS)
bench: $(VENV)/dev ; $(BIN)/python -m bench.all $(ARGS)

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_protos.py

protos: $(VENV)/dev
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. protos/*.proto

$(VENV)/demo: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the demo's packages into $(VENV) ..."
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/demo-torch: $(VENV)/demo
	$(PIP) -e '.[demo,torch]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the development packages into $(VENV) ..."
	$(PIP) -e '.[dev]'
	@touch $@

clean: ; rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
