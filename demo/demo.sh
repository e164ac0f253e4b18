#!/bin/sh
# make demo: looks whether this machine has what the demo needs, builds it into bin/ and runs it.
set -eu
cd "$(dirname "$0")/.."

fail() {
	printf 'demo: %s\n' "$@" >&2
	exit 1
}

[ "$(uname -s)" = Linux ] || fail "sharing model memory between processes needs Linux; this is $(uname -s)"

# The version that go.mod asks for. Since 1.21 the go command fetches it by itself where it may.
want=$(sed -n 's/^go //p' go.mod)
command -v go >/dev/null 2>&1 ||
	fail "Go is not installed" "install Go $want or later from https://go.dev/dl/ and try again"
have=$(go env GOVERSION 2>&1) ||
	fail "this Go cannot build the project, which needs Go $want:" "$have" "install Go $want or later from https://go.dev/dl/ and try again"
minor() { printf '%s\n' "$1" | sed -n 's/^\(go\)\{0,1\}1\.\([0-9][0-9]*\).*/\2/p'; }
[ "$(minor "$have")" -ge "$(minor "$want")" ] 2>/dev/null ||
	fail "Go is too old: it is ${have:-before go1.16}, and go$want is needed" "install it from https://go.dev/dl/ and try again"

command -v python3 >/dev/null 2>&1 ||
	fail "python3 is not installed, and half of the workers are Python scripts" "install Python 3.9 or later and try again"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
	fail "python3 is $(python3 -V 2>&1), and 3.9 or later is needed"

mkdir -p bin
# The Python workers use the package in python/, which needs xxhash and nothing else. Without it they
# map a path, and the demo says so.
python=python3
if ! python3 -c 'import xxhash' 2>/dev/null; then
	python=bin/demo-venv/bin/python
	$python -c 'import xxhash' 2>/dev/null || {
		echo "demo: fetching xxhash for the Python workers, once ..."
		rm -rf bin/demo-venv
		python3 -m venv bin/demo-venv && $python -m pip install --quiet --disable-pip-version-check 'xxhash>=3.0'
	} || {
		rm -rf bin/demo-venv
		python=python3
	}
fi
go build -o bin/shmctl ./cmd/shmctl
go build -o bin/onecopy-demo ./demo
exec bin/onecopy-demo --python "$python" "$@"
