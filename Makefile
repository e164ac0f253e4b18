# make test is everything that CI runs; scripts/test.sh knows the single steps.
.DEFAULT_GOAL := help
.PHONY: help demo test build generate race crash fuzz model bench bench-peers bench-tokens bench-report lint clean

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

fuzz: ## every fuzz target for FUZZTIME (1m)
	@FUZZTIME=$${FUZZTIME:-1m} scripts/test.sh fuzz

model: ## the protocol's model checker, default set (some minutes)
	go run ./internal/model/cmd/modelcheck

# The part to measure, and where the figures go: make bench PART="load micro".
PART ?=
JSON ?= bin/bench.jsonl
# Libraries that the workers are compared with: make bench-peers PEERS="numpy lmdb".
PEERS ?= numpy safetensors lmdb ray torch

bench: ## the benchmark, all of it or PART; figures into bin/bench.jsonl
	@mkdir -p $(dir $(JSON))
	go run ./bench $(PART) --json $(JSON) $(if $(wildcard .venv/bin/python),--python .venv/bin/python)

bench-peers: ## what onecopy is compared with, into .venv; make bench uses it
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(PEERS)

bench-tokens: ## fetch llama.cpp and a model, then measure tokens per second
	scripts/fetch_llama.py
	scripts/fetch_model.py smollm2
	$(MAKE) bench PART=tokens

bench-report: ## one HTML page with plots from bin/bench.jsonl
	cd bench/report && go run . $(abspath $(JSON)) > $(abspath $(JSON:.jsonl=.html))

lint: ## gofmt, vet, the house rules, and golangci-lint where it is installed
	@scripts/test.sh format vet
	go test ./internal/lint
	@if command -v golangci-lint >/dev/null; then golangci-lint run; else echo "golangci-lint is not installed: skipped"; fi

clean: ## remove what make has built
	rm -rf bin
