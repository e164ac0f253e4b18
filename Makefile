# make test is everything that CI runs; scripts/test.sh knows the single steps.
.DEFAULT_GOAL := help
.PHONY: help demo test build generate race crash fuzz model bench lint clean

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18

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

bench: ## micro-benchmarks, then the multi-process benchmark
	go test -run '^$$' -bench . -benchmem ./internal/layout ./lockfile ./shm ./registry
	go run ./bench

lint: ## gofmt, vet, the house rules, and golangci-lint where it is installed
	@scripts/test.sh format vet
	go test ./internal/lint
	@if command -v golangci-lint >/dev/null; then golangci-lint run; else echo "golangci-lint is not installed: skipped"; fi

clean: ## remove what make has built
	rm -rf bin
