# make test is everything that CI runs; scripts/test.sh knows the single steps.
.DEFAULT_GOAL := help
.PHONY: help demo test build generate race crash cover torture mutants faults soak hostile fuzz model bench bench-peers bench-python bench-tokens bench-report python-extra python-kills overcommit rollouts binaries deb test-deb wheels test-wheels promtool manifests test-docker lint clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 21

demo: ## ten processes share one real model; one of them is killed
	@demo/demo.sh

test: ## everything that CI runs
	@scripts/test.sh

build: ## shmctl into bin/
	go build -o bin/ ./cmd/shmctl

generate: ## docs and constants from the layout
	go generate ./...

race: ## the tests of the shared-memory packages under the race detector
	@scripts/test.sh race

crash: ## kill -9 at every named step
	@scripts/test.sh crash

# make torture TIME=5m PROCESSES=16 SEED=7, or KILLS=1000000 in place of TIME; the seed of a run is in its report.
# Python workers take part if make test has made their environment.
TIME ?= 90m

torture: ## processes killed with -9 by the hundred thousand, for TIME (90m) or KILLS
	go build -tags crashpoint -o bin/torture ./internal/torture
	bin/torture $(if $(filter command,$(firstword $(origin KILLS))),-kills $(KILLS),-time $(TIME)) -processes $(PROCESSES) $(if $(filter-out 0,$(SEED)),-seed $(SEED)) \
		$(if $(wildcard bin/venv/bin/python),-python bin/venv/bin/python) -report docs/reports/torture.md
	bin/torture -report docs/reports/torture.md -readme README.md

mutants: ## put one bug after the other into the library; make torture has to find each within three minutes
	go run -tags crashpoint ./internal/torture -mutants all -report docs/reports/mutants.md

cover: ## what the tests reach, killed processes included (a quarter of an hour)
	@scripts/cover.sh

faults: ## every system call fails with every errno that it can have, in Go and in Python (an hour or two; FAULTS=N takes every N-th)
	ONECOPY_FAULTS=$(or $(FAULTS),1) ONECOPY_PYTHON=$(if $(wildcard bin/venv/bin/python),$(CURDIR)/bin/venv/bin/python) \
		go test ./registry ./shm -run '^Test(Faults|PythonFaults|BadDays)$$' -v -count=1 -timeout 3h

soak: ## REPLACES (10,000) of a model while 15 processes attach, read and leave: nothing may grow
	ONECOPY_SOAK=$(or $(REPLACES),10000) go test ./registry -run '^TestSoak$$' -v -count=1 -timeout 1h

hostile: ## random bytes over a live registry, every byte flipped, the registry deleted each second for a minute (ten minutes)
	ONECOPY_SCRIBBLES=$(or $(SCRIBBLES),300000) ONECOPY_FLIPS=1 ONECOPY_DELETIONS=$(or $(DELETIONS),60) \
		go test ./registry -run '^Test(Scribbler|EveryByteFlipped|DeletedAgainAndAgain)$$' -v -count=1 -timeout 2h
	$(if $(wildcard bin/venv/bin/python),cd python && ONECOPY_TEST_SCRIBBLES=30000 ../bin/venv/bin/python -m pytest tests/test_scribble.py)

fuzz: ## every fuzz target, or TARGETS (a part of their names), for FUZZTIME (30m); what they found is kept
	@FUZZTIME=$${FUZZTIME:-30m} FUZZLOG=docs/reports/fuzz.tsv scripts/fuzz.sh $(TARGETS)

model: ## the protocol's model checker, default set (some minutes); MODEL=-all the big ones too (some GB)
	go run ./internal/model/cmd/modelcheck $(MODEL)

# The part to measure, and where the figures go: make bench PART="load micro".
PART ?=
JSON ?= bin/bench.jsonl
# Libraries that the workers are compared with: make bench-peers PEERS="numpy lmdb".
PEERS ?= xxhash numpy safetensors joblib lmdb ray torch

bench: ## the benchmark, all of it or PART; figures into bin/bench.jsonl
	@mkdir -p $(dir $(JSON))
	go run ./bench $(PART) --json $(JSON) $(if $(wildcard .venv/bin/python),--python .venv/bin/python)

bench-peers: ## what onecopy is compared with, into .venv; make bench uses it
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(PEERS)

bench-python: ## the original idea's benchmark and the targets of the Python package, in .venv (torch: make bench-peers)
	@test -x .venv/bin/python || { python3 -m venv .venv && .venv/bin/python -m pip install --quiet xxhash numpy; }
	.venv/bin/python python/bench/original_idea.py
	.venv/bin/python python/bench/targets.py

# What the recipes of examples/python need besides what make test installs. Some GB; and llama-cpp-python has no
# wheel on the index, so that pip compiles it (a quarter of an hour on two cores; needs a C++ compiler).
EXTRA ?= torch transformers onnxruntime onnx llama-cpp-python

python-extra: ## tests and recipes of the Python package with torch, transformers, onnxruntime, llama.cpp: downloads some GB
	@test -x bin/venv-extra/bin/python || python3 -m venv bin/venv-extra
	bin/venv-extra/bin/python -m pip install --quiet xxhash -r python/requirements-test.txt $(EXTRA)
	scripts/fetch_model.py minilm
	scripts/fetch_model.py smollm2
	cd python && ../bin/venv-extra/bin/python -m pytest tests/test_torch.py
	ONECOPY_MODELS=$$(dirname "$$(scripts/fetch_model.py minilm)") ONECOPY_EXTRA="$(EXTRA)" \
		bin/venv-extra/bin/python -m pytest -c python/pyproject.toml --rootdir examples/python examples/python -rs -s

# The number of kills at each of the 62 named steps, and how many steps are tried at a time.
KILLS ?= 500
SHARDS ?= 2

python-kills: ## KILLS (500) Python processes killed with -9 at each named step (some minutes), and docs/reports/python-kills.md
	@test -x bin/venv/bin/python || scripts/test.sh python
	cd python && seq $(SHARDS) | xargs -P $(SHARDS) -I {} env ONECOPY_TEST_KILLS=$(KILLS) ONECOPY_TEST_SHARD={}/$(SHARDS) \
		ONECOPY_TEST_REPORT=../docs/reports/python-kills ../bin/venv/bin/python -m pytest -v tests/test_kills.py

bench-tokens: ## fetch llama.cpp and a model, then measure tokens per second
	scripts/fetch_llama.py
	scripts/fetch_model.py smollm2
	$(MAKE) bench PART=tokens

bench-report: ## one HTML page with plots from bin/bench.jsonl
	cd bench/report && go run . $(abspath $(JSON)) > $(abspath $(JSON:.jsonl=.html))

# make overcommit MINUTES=1 PROCESSES=16 MODELS=210 SEED=7 TRACES=zipf,scan,mixed; SEED=0 takes one from the clock.
MINUTES ?= 10
PROCESSES ?= 16
MODELS ?= 210
SEED ?= 0
TRACES ?= zipf,scan
ROLLOUTS ?= 100

overcommit: ## three times as many models as the budget has, for MINUTES (10), against an exact LRU
	go run ./internal/campaign overcommit -minutes $(MINUTES) -processes $(PROCESSES) -models $(MODELS) -traces $(TRACES) -seed $(SEED) -report docs/reports/overcommit

rollouts: build ## ROLLOUTS (100) under HTTP load, with publishers that are killed
	go run ./internal/campaign rollouts -rollouts $(ROLLOUTS) -processes $(PROCESSES) -seed $(SEED) -report docs/reports/rollouts

binaries: ## static shmctl for amd64 and arm64 into dist/
	packaging/build.sh binaries

deb: ## Debian packages for amd64 and arm64 into dist/
	packaging/build.sh deb

test-deb: deb ## install, use and purge the package in a clean root (packaging/README.md)
	packaging/test-deb.sh

wheels: ## Python wheels with shmctl for x86_64 and aarch64, and the sdist, into dist/
	python/build_wheels.sh

test-wheels: wheels ## install and use them in fresh virtual environments
	python/test_wheels.sh

promtool: ## have promtool judge all metrics
	@scripts/promtool.sh

manifests: ## read the Kubernetes and Compose examples strictly
	cd packaging/manifests && go vet ./... && go test -count=1 ./...

test-docker: binaries ## run the Compose examples; needs a Docker daemon
	examples/docker/try.sh

lint: ## gofmt, vet, the house rules, and golangci-lint where it is installed
	@scripts/test.sh format vet
	go test ./internal/lint
	@if command -v golangci-lint >/dev/null; then golangci-lint run; else echo "golangci-lint is not installed: skipped"; fi

clean: ## remove what make has built
	rm -rf bin dist
