#!/bin/sh
# Wheels for Linux on x86_64 and aarch64, each with a static shmctl, and one without
# for everything else, into the folder $1 (dist). Needs Go and: pip install build
set -eu
out=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
cd "$(dirname "$0")"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
for pair in amd64:x86_64 arm64:aarch64; do
	(cd .. && CGO_ENABLED=0 GOOS=linux GOARCH="${pair%:*}" go build -trimpath -ldflags '-s -w' -o "$tmp/shmctl" ./cmd/shmctl)
	ONECOPY_SHMCTL="$tmp/shmctl" ONECOPY_WHEEL_TAG="manylinux2014_${pair#*:}" python3 -m build --wheel --outdir "$out" .
done
python3 -m build --outdir "$out" .
