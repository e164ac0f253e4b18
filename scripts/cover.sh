#!/usr/bin/env bash
# What the tests reach of the packages that hold the protocol: per package in
# percent, and every place that none of them reached in bin/cover/uncovered.txt. Fails
# below 90 %, and for an error return that is neither reached nor justified in
# internal/uncovered/testdata/justified.txt.
#
#	scripts/cover.sh            all builds (make cover; FAULTS=N tries every N-th fault, not one for each call)
#	scripts/cover.sh layout     only those whose names contain this; the figures are lower
#
# Most of what happens happens in child processes: a test binary executes itself. A
# binary that go test -c -cover has built writes its counters in two ways. The process
# that runs the tests does at their end, to -test.gocoverdir. Any other, which never
# comes to that end, does when it exits, by a hook of the Go runtime, to GOCOVERDIR.
# The hook does not run for a process that is killed; so crash points exit in these
# builds (internal/crashpoint/on.go). go test itself would set GOCOVERDIR to a folder
# that other users cannot enter, so the binaries are started here.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=./lockfile,./shm,./registry,./internal/layout
out=$PWD/bin/cover
only=${1:-}
faults=${FAULTS:-calls} # one errno for each call
rm -rf "$out"
mkdir -p "$out"
# Children that have become another user write here as well.
data=$(mktemp -d)
trap 'rm -rf "$data"' EXIT
chmod 1777 "$data"

failed=()
# measure NAME FOLDER TAGS [FLAG...]: the tests of a folder, built with the tags.
measure() {
	local name=$1 dir=$2 tags=$3 start=$SECONDS
	shift 3
	[[ $name == *$only* ]] || return 0
	go test -c -cover -covermode=atomic -coverpkg=$packages -tags "$tags" -o "$out/$name.test" "./$dir" \
		2> >(grep -v '^warning: no packages being tested' >&2)
	if (cd "$dir" && GOCOVERDIR=$data "$out/$name.test" -test.gocoverdir="$data" -test.timeout=2h "$@" >"$out/$name.log" 2>&1); then
		printf '%-20s %4ds\n' "$name" $((SECONDS - start))
	else
		printf '%-20s %4ds  FAILED\n' "$name" $((SECONDS - start))
		grep -E '^ *--- FAIL|^panic|^fatal' "$out/$name.log" | head -n 20 || true
		failed+=("$name")
	fi
	rm -f "$out/$name.test"
}

measure layout internal/layout ''
measure lockfile lockfile ''
ONECOPY_FAULTS=1 measure shm shm ''
ONECOPY_FAULTS=$faults measure registry registry ''
measure shmctl cmd/shmctl '' -test.run=Script
measure shm-invariants shm invariants
measure registry-invariants registry invariants -test.short
measure registry-private registry onecopy_private
measure registry-crash registry crashpoint -test.run=Crash -kills=4

go tool covdata textfmt -i="$data" -o="$out/profile.txt"
status=0
go run ./internal/uncovered -justified internal/uncovered/testdata/justified.txt -list "$out/uncovered.txt" "$out/profile.txt" || status=1
echo "every place that was not reached: bin/cover/uncovered.txt"
if [ ${#failed[@]} -gt 0 ]; then
	echo "tests FAILED: ${failed[*]} (bin/cover/*.log)"
	status=1
fi
exit $status
