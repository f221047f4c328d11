# `make help` lists the targets. Everything happens inside .venv; nothing is installed outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
UNFINISHED := $(VENV).unfinished
CORES := $(shell nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help install mobile test test-rig lint gate baseline teacher study-tiny evidence clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install everything into it (5 to 15 minutes, once)

# llama-cpp-python is compiled from source; the checks come first so that a missing compiler is told in one line.
# pip takes a package of which only half the files were copied for installed, so after an interruption all is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11 or missing. Type: make PYTHON=python3.11 (or newer)" >&2; exit 2; }
	@for tool in gcc g++ cmake; do command -v $$tool >/dev/null || { echo "$$tool is missing: it builds llama-cpp-python. On Debian or Ubuntu type: apt-get install gcc g++ cmake make python3-venv" >&2; exit 2; }; done
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu type: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing into $(VENV): about 2 GB, and llama.cpp is compiled; 5 to 15 minutes without a word"
	@if [ -e $(UNFINISHED) ]; then echo "the last installation did not end: making $(VENV) anew"; rm -rf $(VENV); fi
	@touch $(UNFINISHED)
	$(PYTHON) -m venv $(VENV)
	CMAKE_BUILD_PARALLEL_LEVEL=$(CORES) CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release" \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@rm $(UNFINISHED)
	@touch $@

mobile: $(INSTALLED) ## the whole road: distil, export, measure, report (runs/tiny/report/index.html)
	$(BIN)/pocketvlm run configs/tiny.yaml

test: $(INSTALLED) ## all tests
	$(BIN)/python -m pytest

test-rig: $(INSTALLED) ## the tests on emulated devices: fetches real adb, adbd, sshd for arm64 (Debian; 400 MB, once)
	$(BIN)/python -m tests.rig.fetch
	RIG=1 $(BIN)/python -m pytest tests/rig

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

gate: $(INSTALLED) ## compare runs/tiny with baselines/tiny.json; exit 1 on a regression
	$(BIN)/pocketvlm gate runs/tiny/report/report.json --baseline baselines/tiny.json --allowances configs/gate.yaml

baseline: $(INSTALLED) ## show what changed, then make runs/tiny the baseline that `make gate` compares with
	$(BIN)/pocketvlm gate runs/tiny/report/report.json --baseline baselines/tiny.json --allowances configs/gate.yaml --update

teacher: $(INSTALLED) ## train the shipped vision tower and teacher anew (takes as long as it needs)
	$(BIN)/python -m distill.tower --out runs/tower-cells --steps 1300 --threads 1
	$(BIN)/python -m distill.tower --out runs/tower --init runs/tower-cells --steps 500 --seed 1
	$(BIN)/pocketvlm distill configs/teacher.yaml
	$(BIN)/python -m pocketvlm.teacher

study-tiny: $(INSTALLED) ## what distillation is worth: three seeds, distilled against undistilled, paired
	$(BIN)/pocketvlm ablate studies/tiny.yaml

STUDIES = main converged transfer methods recipe when paper
evidence: $(INSTALLED) ## all studies, and docs/evidence.md from them (many hours; goes on where it was stopped)
	$(BIN)/python -m distill.tower --out runs/transfer-tower --patch 16 --steps 1300 --threads 1
	$(BIN)/pocketvlm distill configs/transfer_teacher.yaml
	$(BIN)/pocketvlm distill configs/converged.yaml
	$(BIN)/pocketvlm distill configs/transfer_teacher.yaml distill.stages.1.steps=1000 --out runs/transfer-teacher-1600
	$(BIN)/pocketvlm distill configs/transfer_teacher.yaml distill.stages.1.steps=3000 --out runs/transfer-teacher-3600
	failed=; for study in $(STUDIES); do $(BIN)/pocketvlm ablate studies/$$study.yaml >/dev/null || failed="$$failed $$study"; done; \
	$(BIN)/python -m pocketvlm.evidence --collect runs && if [ "$$failed" ]; then echo "not complete:$$failed" >&2; exit 1; fi

clean: ## remove what runs and tests left (not .venv)
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
