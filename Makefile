# make quickstart   fresh machine: environment, generated corpus, a whole small run (DATA_DIR=... to use real data)
# make test         fresh machine: environment, then the tests but those marked slow
# make test-all     all tests: compilers, jobs of several processes and their kills, mutations and data at scale too
# make setup        the environment alone
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-all
setup: .venv/ready

# torch has no hash here: its file differs between CPU and CUDA builds. Everything else is pinned by hash.
.venv/ready: requirements.txt requirements-eval.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("the pinned environment needs Python 3.11 or newer (the scripts themselves 3.10): make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements.lock
	touch $@

quickstart: setup
	$(BIN)/python bench/make_corpus.py
	rm -rf runs/quickstart
	HF_HUB_OFFLINE=1 $(BIN)/python train_6layer_deltanet.py --preset quickstart $(if $(DATA_DIR),--data_dir $(DATA_DIR))

test: SELECTED := -m "not slow"
test test-all: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 15 $(SELECTED) tests
