#!/usr/bin/env bash
# Every fuzz target, or those whose names contain one of the arguments, for FUZZTIME
# each: a time, or with an x a number of executions. As many targets at once as there
# are processors, each with one worker.
#
#	FUZZTIME=30m scripts/fuzz.sh internal/layout       (make fuzz TARGETS=internal/layout FUZZTIME=30m)
#
# With FUZZLOG=FILE.tsv each run is added to that file, FILE.md is written anew from
# it, and the inputs found are copied into the packages' testdata/fuzz, where
# every later go test tries them again.
set -euo pipefail
cd "$(dirname "$0")/.."

time=${FUZZTIME:-1m}
log=${FUZZLOG:-}
largest=16385c # an input that is kept; whole tables are in testdata/layout
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# one DIR/TARGET fuzzes it. The minimizing is short: without that the Go fuzzer does
# little else. At the end of a time it may report its own deadline as a failure.
one() {
	local dir=${1%/*} target=${1##*/} text=$out/${1//\//-} corpus
	if ! go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x -parallel 1 -timeout 0 "./$dir" >"$text" 2>&1 &&
		{ grep -q 'Failing input written' "$text" || ! grep -q '^ *context deadline exceeded' "$text"; }; then
		{ echo "$1 FAILED"; cat "$text"; } >&2
		touch "$out/failed"
		return
	fi
	# fuzz: elapsed: 1m3s, execs: 40000 (35102/sec), new interesting: 2 (total: 123)
	awk -v OFS='\t' -v date="$(date -u +%F)" -v commit="$(git rev-parse --short HEAD 2>/dev/null)" -v dir="$dir" -v target="$target" '
		/^fuzz: elapsed: .* execs: / {
			seconds = 0
			for (rest = $3; match(rest, /^[0-9]+[hms]/); rest = substr(rest, RLENGTH + 1))
				seconds += rest * (substr(rest, RLENGTH, 1) == "h" ? 3600 : substr(rest, RLENGTH, 1) == "m" ? 60 : 1)
			execs = $5
			total = $NF + 0
		}
		END { print date, commit, dir, target, seconds, execs, total }' "$text" >"$text.tsv"
	awk -F '\t' '{ printf "%-40s %11d executions in %5d s, %4d inputs\n", $3 "/" $4, $6, $5, $7 }' "$text.tsv"
	[ -n "$log" ] || return 0
	cat "$text.tsv" >>"$log"
	corpus=$(go env GOCACHE)/fuzz/$(go list "./$dir")/$target
	[ ! -d "$corpus" ] || {
		mkdir -p "$dir/testdata/fuzz/$target"
		find "$corpus" -type f -size -"$largest" -exec cp -t "$dir/testdata/fuzz/$target" {} +
	}
}

# report LOG writes the sums per target.
report() {
	cat <<-'TEXT'
		# What the fuzz targets have executed

		Written by `scripts/fuzz.sh` from the runs in fuzz.tsv beside it. One worker per target; inputs up to 16 KiB are kept in
		the packages' `testdata/fuzz` and tried by every `go test`. CI executes each target 40,000 times more.

		| target | executions | minutes | runs | last | inputs |
		| --- | ---: | ---: | ---: | --- | ---: |
	TEXT
	awk -F '\t' '
		{ t = $3 "/" $4; execs[t] += $6; seconds[t] += $5; runs[t]++; last[t] = $1; inputs[t] = $7 }
		END { for (t in execs) printf "| %s | %d | %.0f | %d | %s | %d |\n", t, execs[t], seconds[t] / 60, runs[t], last[t], inputs[t] }' "$1" | sort
}

targets=$(grep -rnoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | sed -E 's|^\./(.*)/[^/]*:[0-9]+:func |\1/|' | sort)
if [ $# -gt 0 ]; then
	targets=$(grep -F "$(printf '%s\n' "$@")" <<<"$targets") || { echo "fuzz.sh: no target is named like $*" >&2; exit 2; }
fi
for target in $targets; do
	while [ "$(jobs -pr | wc -l)" -ge "$(getconf _NPROCESSORS_ONLN)" ]; do wait -n || true; done
	one "$target" &
done
wait
[ -z "$log" ] || report "$log" >"${log%.tsv}.md"
[ ! -e "$out/failed" ]
