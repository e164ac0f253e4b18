#!/usr/bin/env bash
# Everything that CI runs, or only the steps named as arguments:
#
#	scripts/test.sh                 all steps, in this order
#	scripts/test.sh race crash      these two
#
# A failing step does not stop the others (only a broken build does), and a summary
# ends the output. With CI set in the environment nothing may be skipped for want of a
# tool.
set -uo pipefail
cd "$(dirname "$0")/.."

# A crash run is some thousand kills; the rest stays far below this.
timeout=15m

# format: gofmt has nothing to say.
format() {
	local files
	files=$(gofmt -l .) || return
	[ -z "$files" ] || { printf 'not formatted by gofmt:\n%s\n' "$files"; return 1; }
}

# build comes first: after it the other steps speak of their own failures.
build() { go build ./...; }

# vet, with the tags too: what only tests compile must compile as well.
vet() { go vet ./... && go vet -tags crashpoint,invariants ./...; }

# generate: a second go generate changes nothing. Uncommitted work is fine, because
# the files are compared with themselves, before and after.
generate() {
	local before after
	before=$(generated_sums) && go generate ./... && after=$(generated_sums) || return
	[ "$before" = "$after" ] || {
		echo 'stale until this run; now up to date, so look at them and commit:'
		diff <(echo "$before") <(echo "$after") | sed -n 's/^> [0-9a-f]*  /	/p'
		return 1
	}
}

generated_sums() {
	{
		grep -rIlE --exclude-dir=.git --exclude-dir=bin 'generated .*DO NOT EDIT|DO NOT EDIT.* generated' .
		find docs/FORMAT.md testdata/layout -type f 2>/dev/null
		true # what is not there is not stale
	} | sort -u | sed 's|^\./||' | xargs -d '\n' sha256sum
}

# cross: it compiles elsewhere. Sharing needs Linux, and says so at run time.
cross() {
	local target status=0
	for target in linux/arm64 darwin/arm64 windows/amd64; do
		echo "build for $target"
		GOOS=${target%/*} GOARCH=${target#*/} CGO_ENABLED=0 go build ./... || status=1
	done
	return $status
}

unit() { go test -timeout $timeout ./...; }

# race: the packages whose goroutines share memory.
race() {
	if ! command -v "$(go env CC)" >/dev/null; then
		skip 'the race detector needs a C compiler (on Debian: apt-get install gcc libc6-dev)' tool
		return
	fi
	CGO_ENABLED=1 go test -race -timeout $timeout ./lockfile ./shm ./registry
}

invariants() { go test -tags invariants -timeout $timeout ./registry ./shm; }

# private: where nothing can be shared, the same calls work with private memory.
private() { go test -tags onecopy_private -timeout $timeout ./registry; }

# crash: kill -9 at every named step. Zero tests would pass too, hence the look first.
crash() {
	go test -tags crashpoint -list Crash ./registry | grep '^Test' >/dev/null || {
		echo 'no test of ./registry is named Crash'
		return 1
	}
	go test -tags crashpoint -count=1 -timeout $timeout ./internal/crashpoint &&
		go test -tags crashpoint -run Crash -count=1 -timeout $timeout ./registry
}

# torture: processes killed at random and at every named step; make torture takes longer.
torture() {
	local python=bin/venv/bin/python
	[ -x $python ] || python=
	go build -tags crashpoint -o bin/torture ./internal/torture || return
	bin/torture -time "${TORTURE:-115s}" ${python:+-python $python} && return
	[ $? = 77 ] && skip 'a tmpfs of our own needs root, or user namespaces'
}

# fuzz: every target for a moment; make fuzz takes longer.
fuzz() { FUZZTIME=${FUZZTIME:-40000x} scripts/fuzz.sh; }

# python: the client in python/, in a virtual environment of its own that is made once
# and made anew when its requirements change.
python() {
	local venv=bin/venv stamp=bin/venv/requirements.txt
	if ! cmp -s python/requirements-test.txt $stamp; then
		rm -rf $venv
		if ! { python3 -m venv $venv && $venv/bin/python -m pip install --quiet --disable-pip-version-check \
			xxhash -r python/requirements-test.txt; }; then
			rm -rf $venv
			skip 'the Python tests need python3-venv and the Python package index' tool
			return
		fi
		cp python/requirements-test.txt $stamp
	fi
	(cd python && ../$venv/bin/python -m ruff check src tests bench && ../$venv/bin/python -m mypy &&
		../$venv/bin/python -m pytest --cov) &&
		$venv/bin/python -m pytest -c python/pyproject.toml --rootdir examples/python examples/python &&
		ONECOPY_PYTHON=$PWD/$venv/bin/python go test ./registry -run '^TestPythonFaults$'
}

# ---- running and reporting ----------------------------------------------------

skipped=
# skip WHY [tool]: the step cannot run here; for want of a tool, that fails in CI.
skip() {
	echo "skipped: $1"
	[ -z "${CI:-}" ] || [ "${2:-}" != tool ] || return 1
	skipped=$1
}

steps=("$@")
all=(format build vet generate cross unit race invariants private crash fuzz python torture)
[ $# -gt 0 ] || steps=("${all[@]}")
for step in "${steps[@]}"; do
	[[ " ${all[*]} " == *" $step "* ]] || { echo "test.sh: no step $step; there are ${all[*]}" >&2; exit 2; }
done

summary=()
failed=()
began=$SECONDS
for step in "${steps[@]}"; do
	printf '\n== %s\n' "$step"
	start=$SECONDS
	skipped=
	if "$step"; then
		result=${skipped:+skipped: $skipped}
		result=${result:-ok}
	else
		result=FAILED
		failed+=("$step")
	fi
	summary+=("$(printf '%-11s %4ds  %s' "$step" $((SECONDS - start)) "$result")")
	[ "$step" != build ] || [ "$result" = ok ] || break
done

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
if [ ${#failed[@]} -gt 0 ]; then
	printf '%d of %d steps FAILED after %ds: %s\n' ${#failed[@]} ${#summary[@]} $((SECONDS - began)) "${failed[*]}"
	exit 1
fi
printf 'all %d steps passed in %ds\n' ${#summary[@]} $((SECONDS - began))
