#!/bin/bash
# Runs both compose files with three workers each on a small model and looks at what
# they share. Needs a Docker daemon with compose, and dist/ (packaging/build.sh binaries).
# BASE is an image with python3, or a tar file of a root filesystem with it, for a
# machine that reaches no registry.
set -euo pipefail
cd "$(dirname "$0")/../.."
base=${BASE:-python:3.13-slim}
work=$(mktemp -d)
export MODELS=$work/models IMAGE=onecopy-try COMPOSE_PROJECT_NAME=onecopy-try
file=
cleanup() {
	[ -z "$file" ] || docker compose -f "$file" down -v -t 1 >/dev/null 2>&1 || true
	rm -rf "$work"
}
trap cleanup EXIT
fail() {
	echo "FAILED: $*" >&2
	docker compose -f "$file" logs >&2 || true
	exit 1
}

mkdir -p "$MODELS/bert"
chmod 755 "$work" "$MODELS" "$MODELS/bert"
head -c 20000000 /dev/urandom >"$MODELS/bert/model.safetensors"
sum=$(sha256sum "$MODELS/bert/model.safetensors" | cut -d ' ' -f 1)
if [ -f "$base" ]; then
	docker import "$base" onecopy-try-base >/dev/null
	base=onecopy-try-base
fi
# Only what the Dockerfile copies: not the models and environments that lie about here.
mkdir -p "$work/context/dist" "$work/context/examples"
cp dist/shmctl-linux-* "$work/context/dist/"
cp examples/serve.py "$work/context/examples/"
docker build -q --build-arg BASE="$base" --build-arg TARGETARCH="$(go env GOARCH 2>/dev/null || dpkg --print-architecture)" \
	-f examples/docker/Dockerfile -t "$IMAGE" "$work/context" >/dev/null

[ $# -gt 0 ] || set -- examples/docker/compose.tmpfs-volume.yaml examples/docker/compose.host-shm.yaml
for file in "$@"; do
	echo "== $file"
	compose() { docker compose -f "$file" "$@"; }
	compose up -d --scale worker=3 --quiet-pull >/dev/null 2>"$work/up" || fail "compose up: $(cat "$work/up")"
	for i in 1 2 3; do
		served=$(compose exec -T --index "$i" worker python3 -c '
import time, urllib.request
for _ in range(600):
    try:
        print(urllib.request.urlopen("http://127.0.0.1:8080/").read().decode())
        break
    except OSError:
        time.sleep(0.1)') || fail "worker $i"
		grep -q "$sum" <<<"$served" || fail "worker $i serves: $served"
	done
	compose exec -T worker shmctl ls
	compose exec -T worker shmctl holders bert
	[ "$(compose exec -T worker shmctl ls --no-headers | wc -l)" = 1 ] || fail "want one model"
	# One copy: each worker has the same file of the same tmpfs.
	places=$(for i in 1 2 3; do compose exec -T --index "$i" worker sh -c 'stat -L -c %d:%i $(shmctl path bert 2>/dev/null)/model.safetensors'; done | sort | uniq -c)
	[ "$(wc -l <<<"$places")" = 1 ] || fail "the workers have different files: $places"
	echo "three workers, one file:$places"
	# A worker is killed; its lease goes with it, the model and the others stay.
	docker kill -s KILL "$(compose ps -q worker | head -n 1)" >/dev/null
	compose exec -T --index 3 worker shmctl stat -q bert >/dev/null || compose exec -T --index 2 worker shmctl stat -q bert >/dev/null
	compose exec -T gc shmctl check
	compose exec -T gc sh -c 'rm -rf "$ONECOPY_DIR"/*' # the host's /dev/shm would keep it
	compose down -v -t 1 >/dev/null 2>&1 || fail "compose down"
	[ -z "$(docker volume ls -q --filter name=onecopy-try)" ] || fail "a volume is left"
	rmdir /dev/shm/onecopy-compose 2>/dev/null || true
done
echo "try.sh: all passed"
