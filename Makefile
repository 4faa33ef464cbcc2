# make run · make test · make notebooks · make figures · make parity · make bench · make lint
# TOPICS=3,7 lets figures and bench run for these topics only.
# On Linux without a GPU, `make run CPU=1` fetches PyTorch's CPU wheels and spares gigabytes of CUDA packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: run test notebooks figures parity bench lint clean
.DEFAULT_GOAL := run

run: $(VENV)/installed
	$(BIN)/python 05-building-from-scratch/building_from_scratch.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto

notebooks: $(VENV)/installed
	$(BIN)/python 01-prerequisites/workbench.py notebooks

figures: $(VENV)/installed
	$(BIN)/python 01-prerequisites/workbench.py every figures $(if $(TOPICS),--topics $(TOPICS))

bench: $(VENV)/installed
	$(BIN)/python 01-prerequisites/workbench.py bench $(if $(TOPICS),--topics $(TOPICS))

parity: $(VENV)/installed
	rm -f parity.json
	$(BIN)/python -m pytest -q -n auto
	$(BIN)/python 01-prerequisites/workbench.py parity

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# The environment is made once, and again only when the list of dependencies changes. pip is what venv makes last: one
# that was interrupted has none, and is completed.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ echo "venv failed; on Debian and Ubuntu: sudo apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet -r requirements.txt $(PIP_FLAGS)
	@touch $@

clean:
	rm -rf $(VENV) runs parity.json
