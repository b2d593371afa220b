# Each target sets up .venv by itself and is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: minatar pong figures study test test-long sync

# the quick look: train, draw the learning curve, play a game
minatar: $(VENV)/installed
	$(BIN)/python agents/qrdqn.py --exp-name minatar --batch-size 8 --env-id MinAtar/Breakout-v1 \
	  --total-timesteps 100000 --learning-starts 1000 --target-network-frequency 1000 --exploration-steps 50000 \
	  --learning-rate 2.5e-4 --adam-eps 3.125e-4 --save-model
	@run=$$(ls -dt runs/MinAtar-Breakout-v1__minatar__1__* | head -n 1) && \
	  $(BIN)/python benchmarks/curve.py $$run --out $$run/curve.png && \
	  $(BIN)/python enjoy.py $$run --episodes 1 --video $$run/game.mp4 && \
	  echo "learning curve: $$run/curve.png" && \
	  echo "game played:    $$run/game.mp4"

pong: $(VENV)/installed
	@echo 'QR-DQN learns Pong with a batch of 8, for 100 million frames as in the study: days on a CPU, 7.1 GB of memory.'
	@echo 'Its curve:     $(BIN)/tensorboard --logdir runs, then open http://localhost:6006'
	@echo 'To stop:       Ctrl-C, which writes a checkpoint; make pong goes on from there.'
	@echo 'A quick look:  make minatar, two minutes, draws a learning curve and plays a game.'
	@echo
	$(BIN)/python agents/qrdqn.py --batch-size 8 --env-id ALE/Pong-v5 --resume auto

# every figure of the study, at a scale of minutes: that it runs and draws, not what it shows
figures: $(VENV)/installed
	$(BIN)/python -m experiments run all --scale smoke

# does a smaller batch help DQN, and QR-DQN? On MinAtar, hours; goes on where it was stopped
study: $(VENV)/installed
	$(BIN)/python -m experiments run small-batch --scale minatar --record docs/results/small_batch_minatar.csv \
	  --out docs/results

# two tests at a time, each on one core
test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m 'not long'

test-long: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m long

# copy every shared block of one agent to the other agents that have it: make sync FROM=agents/qrdqn.py
FROM ?= agents/dqn.py
sync: $(VENV)/installed
	$(BIN)/python tests/sync.py $(FROM)
	$(BIN)/ruff format -q agents

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
