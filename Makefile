# make demo | test | bench: each sets up what it needs (Python 3.11+ and make are enough).
PYTHON ?= python3
.PHONY: demo test bench venv test-runs test-parts
venv: .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch .venv/ready
demo: venv
	.venv/bin/python lottery.py
# Two halves of one file, side by side: most tests use one core.
RUNS = killed or leaves_its_files or refused or bird or elastic or one_shot or own_loss
test: venv
	$(MAKE) -j2 --output-sync=target test-runs test-parts
test-runs:
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q test_lottery.py -k "$(RUNS)"
test-parts:
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q test_lottery.py -k "not ($(RUNS))"
bench: venv
	.venv/bin/python test_lottery.py
