#!/bin/bash
# Has promtool judge what "shmctl metrics" prints, in each of its ways, and what the Go
# collector gives. promtool is taken from PATH, or out of Debian's package prometheus,
# which is downloaded into bin/ and not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v promtool >/dev/null; then
	if [ ! -x bin/promtool ]; then
		mkdir -p bin/prometheus
		(cd bin/prometheus && apt-get download -q prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool)
		mv bin/prometheus/usr/bin/promtool bin/promtool
		rm -r bin/prometheus
	fi
	PATH=$PWD/bin:$PATH
fi
promtool --version 2>&1 | head -n 1

work=$(mktemp -d)
ONECOPY_DIR=/dev/shm/onecopy-test-promtool-$$
export ONECOPY_DIR
server=
cleanup() {
	[ -z "$server" ] || kill "$server" 2>/dev/null || true
	rm -rf "$work" "$ONECOPY_DIR"
}
trap cleanup EXIT

# judge NAME: standard input has metrics, and promtool nothing to say.
judge() {
	cat >"$work/text"
	grep -q '^onecopy_up ' "$work/text" || { echo "FAILED: $1: no metrics" >&2; return 1; }
	promtool check metrics <"$work/text" >"$work/says" 2>&1 && [ ! -s "$work/says" ] || {
		echo "FAILED: $1" >&2
		cat "$work/says" >&2
		return 1
	}
	echo "ok: $1, $(grep -vc '^#' "$work/text") samples"
}

go build -o "$work/shmctl" ./cmd/shmctl
shmctl=$work/shmctl
"$shmctl" metrics 2>/dev/null | judge "shmctl metrics without a registry"
echo weights >"$work/model"
"$shmctl" load -q first "$work/model" >/dev/null
"$shmctl" load -q 'a "strange" \ näme' "$work/model" >/dev/null
"$shmctl" load -q --replace first "$work/model" >/dev/null
"$shmctl" pin first
"$shmctl" metrics | judge "shmctl metrics"
"$shmctl" metrics --holders | judge "shmctl metrics --holders"
"$shmctl" metrics --textfile "$work/onecopy.prom"
judge "shmctl metrics --textfile" <"$work/onecopy.prom"
"$shmctl" metrics --listen 127.0.0.1:0 2>"$work/listen" &
server=$!
until url=$(grep -o 'http://[^ ]*/metrics' "$work/listen"); do
	kill -0 $server || { cat "$work/listen" >&2; exit 1; }
	sleep 0.1
done
python3 -c 'import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1]).read())' "$url" | judge "shmctl metrics --listen"
go test -count=1 -run TestNamesAndHelp -v ./metrics >"$work/go" 2>&1 || { cat "$work/go" >&2; exit 1; }
! grep -q -- '--- SKIP' "$work/go" || { cat "$work/go" >&2; exit 1; }
echo "ok: the Go collector with all its options"
