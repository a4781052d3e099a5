# make demo | test | bench: each sets up what it needs (Python 3.11+ and make are enough).
PYTHON ?= python3
.PHONY: demo test bench venv
venv: .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch .venv/ready
demo: venv
	.venv/bin/python lottery.py
test: venv
	.venv/bin/python -m pytest -q test_lottery.py
bench: venv
	.venv/bin/python test_lottery.py
