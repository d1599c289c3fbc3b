# `make quickstart` shows the project at work; `make test` is the whole test suite.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# The task of `make bench-accuracy`; tests/benchmarks/accuracy/run.py lists them.
TASK ?= text-classification

.PHONY: venv moto peers test test-all style-report gpu-bundle gpu-checks gpu-checks-cpu profile-start test-faults test-slurm quickstart bench-accuracy bench-bits bench-cache bench-checkpoint-stall bench-chunked-head bench-coupled bench-coupled-peers bench-leakage bench-listing bench-memory bench-packing bench-packing-encoder bench-plan-memory bench-plan-scale bench-predict bench-recovery bench-shuffle bench-start bench-sweep bench-sweep-many bench-throughput clean

venv: $(STAMP)

# torch first and at its pin: anything else may bring a CUDA build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# An S3 server for tests, in a venv of its own: it needs an older python-dateutil than the constraints have.
moto: .venv-moto/.installed

.venv-moto/.installed: tests/support/s3-requirements.txt
	test -x .venv-moto/bin/python || $(PYTHON) -m venv .venv-moto
	.venv-moto/bin/python -m pip install --quiet --disable-pip-version-check -r tests/support/s3-requirements.txt
	touch $@

# Libraries that some benchmarks compare with, on top of what .venv has; a path file shows it there, so that torch is not
# installed a second time.
PEERS := tests/benchmarks/accuracy/requirements-peers.txt
peers: .venv-peers/.installed

.venv-peers/.installed: $(PEERS) $(STAMP)
	test -x .venv-peers/bin/python || $(BIN)/python -m venv .venv-peers
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/launcher.pth"
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(PEERS)
	touch $@

test: venv moto
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/check.sh

# Everything: what `make test` runs, and what shows the same by slower means (marker `long`); an hour and more.
test-all: test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -m long

# How the code reads, in figures (CONTRIBUTING.md): names, docstrings, comments, lengths.
style-report: venv
	$(BIN)/python tests/style_report.py

# Faults on real clusters: all that `make test` has of them, nodes that die, freeze and are cut off, and random kills.
test-faults: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -s tests/faults

# A real Ray on two nodes under the batch script, started twice: minutes, most of them imports.
test-slurm: venv
	LAUNCHER_TEST_SLURM=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q tests/cluster/test_slurm.py

quickstart: venv
	$(BIN)/python jobs/quickstart/prepare.py
	$(BIN)/launcher train jobs/quickstart.yaml

bench-accuracy: venv $(if $(filter seq2seq sentence-embedding preference-%,$(TASK)),peers)
	$(BIN)/python tests/benchmarks/accuracy/run.py $(TASK)

bench-cache: venv
	$(BIN)/python tests/benchmarks/cache/run.py

# How far the peers' own curves depend on the batch of one device.
bench-coupled: venv
	$(BIN)/python tests/benchmarks/coupled/ours.py

bench-coupled-peers: venv peers
	$(BIN)/python jobs/quickstart/prepare.py
	$(BIN)/python tests/benchmarks/accuracy/prepare_encoder_decoder.py minilm-twice
	$(BIN)/python tests/benchmarks/accuracy/prepare_preference.py
	.venv-peers/bin/python tests/benchmarks/coupled/peers.py

bench-chunked-head: venv
	$(BIN)/python tests/benchmarks/chunked_head/run.py

bench-packing: venv
	$(BIN)/python tests/benchmarks/packing/run.py

bench-packing-encoder: venv
	$(BIN)/python tests/benchmarks/packing/encoder.py

# Ten million rows take some ten minutes on two cores; ROWS=200000 a minute or two.
ROWS ?= 10000000
bench-predict: venv
	$(BIN)/python tests/benchmarks/predict/run.py --rows $(ROWS)

bench-memory: venv
	$(BIN)/python tests/benchmarks/memory/run.py --rows $(ROWS)

bench-shuffle: venv
	$(BIN)/python tests/benchmarks/shuffle/run.py

bench-recovery: venv
	$(BIN)/python tests/benchmarks/recovery/run.py

bench-checkpoint-stall: venv
	$(BIN)/python jobs/quickstart/prepare.py
	$(BIN)/python tests/benchmarks/checkpoint_stall/run.py

bench-plan-memory: venv
	$(BIN)/python tests/benchmarks/plan_memory/run.py

bench-sweep-many: venv
	$(BIN)/python tests/benchmarks/sweep/many.py

bench-start: venv
	$(BIN)/python tests/benchmarks/start/run.py

# Every process of a start, its time and memory.
profile-start: venv
	$(BIN)/python tests/benchmarks/start/profile.py

# What a machine with a GPU and no network lacks, and the checks to run there; tests/gpu/README.md.
gpu-bundle:
	tests/gpu/bundle.sh

gpu-checks: venv
	$(BIN)/python tests/gpu/run.py

gpu-checks-cpu: venv
	$(BIN)/python tests/gpu/run.py --cpu

# What the same bits on any number of workers cost.
bench-bits: venv
	$(BIN)/python tests/benchmarks/bits/run.py

bench-throughput: venv
	$(BIN)/python tests/benchmarks/throughput/run.py

bench-leakage: venv
	$(BIN)/python tests/benchmarks/leakage/run.py

bench-listing: venv moto
	$(BIN)/python tests/benchmarks/listing/run.py

bench-plan-scale: venv
	$(BIN)/python tests/benchmarks/plan_scale/run.py

bench-sweep: venv
	$(BIN)/python tests/benchmarks/sweep/run.py

clean:
	rm -rf .venv data/quickstart runs/quickstart
