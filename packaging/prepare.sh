#!/bin/sh
# Makes what the package is built from, in bin/: the static program, compressed
# manual pages and completions.
set -eu
cd "$(dirname "$0")/.."
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION:-}" -o bin/shmctl ./cmd/shmctl
mkdir -p bin/man bin/completions
for page in docs/man/*.1; do
	gzip -9nc "$page" >"bin/man/$(basename "$page").gz"
done
# The program that is packaged may be for another machine.
for shell in bash zsh fish; do
	GOARCH= GOOS= go run ./cmd/shmctl completion $shell >bin/completions/$shell
done
mv bin/completions/bash bin/completions/shmctl.bash
mv bin/completions/zsh bin/completions/_shmctl
mv bin/completions/fish bin/completions/shmctl.fish
