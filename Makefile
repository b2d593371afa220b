# Each target sets up .venv by itself and is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: pong test sync

pong: $(VENV)/installed
	$(BIN)/python agents/qrdqn.py --batch-size 8 --env-id ALE/Pong-v5

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# copy every shared function and class of one agent to the other agents that have it: make sync FROM=agents/qrdqn.py
FROM ?= agents/dqn.py
sync: $(VENV)/installed
	$(BIN)/python tests/sync.py $(FROM)
	$(BIN)/ruff format -q agents

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
