#!/bin/bash
# Installs what build_wheels.sh made, each in a fresh virtual environment, and uses it:
# the wheel of this machine with its shmctl; then the source distribution, with no Go on
# the path. The wheel of the other machine is unpacked, and its shmctl run by qemu where
# qemu-user is installed. Needs xxhash from the Python package index.
set -euo pipefail
cd "$(dirname "$0")/.."
dist=$PWD/dist
work=$(mktemp -d)
export ONECOPY_DIR=/dev/shm/onecopy-test-wheels-$$
trap 'rm -rf "$work" "$ONECOPY_DIR"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
fail() {
	echo "FAILED: $*" >&2
	exit 1
}
machine=$(uname -m)

cat >"$work/five.py" <<'EOF'
import sys, onecopy
made = []
weights = onecopy.get_or_load("weights", lambda: made.append(1) or b"w" * (1 << 22), version="1")
with onecopy.open("model", sys.argv[1]) as model:
    print(len(made), len(weights), bytes(model["config.json"]).decode().strip())
EOF
mkdir "$work/model"
echo '{"five": "lines"}' >"$work/model/config.json"

# use VENV: the example makes the weights in the first process, not in the second.
use() {
	rm -rf "$ONECOPY_DIR"
	for made in 1 0; do
		got=$(cd "$work" && "$1/bin/python" -W error five.py "$work/model")
		[ "$got" = "$made 4194304 {\"five\": \"lines\"}" ] || fail "the example says $got"
	done
}

echo "== the wheel for $machine"
python3 -m venv "$work/wheel"
wheel=$(ls "$dist"/onecopy-*_"$machine".whl)
"$work/wheel/bin/pip" install --quiet "$wheel"
use "$work/wheel"
"$work/wheel/bin/shmctl" version
(PATH="$work/wheel/bin:$PATH" && [ "$(command -v shmctl)" = "$work/wheel/bin/shmctl" ]) || fail "shmctl is not in bin"
[ "$("$work/wheel/bin/shmctl" ls -q | sort | tr '\n' ' ')" = "model weights " ] || fail "shmctl does not see what Python loaded"
"$work/wheel/bin/shmctl" check
"$work/wheel/bin/pip" uninstall --quiet --yes onecopy
[ ! -e "$work/wheel/bin/shmctl" ] || fail "shmctl is left after uninstalling"
[ "$(find "$work/wheel" -name 'onecopy*' | wc -l)" = 0 ] || fail "files are left after uninstalling"

echo "== what pip may choose from"
for tags in manylinux_2_17_x86_64 musllinux_1_1_x86_64 manylinux_2_17_aarch64 musllinux_1_1_aarch64 macosx_11_0_arm64; do
	"$work/wheel/bin/pip" download --quiet --no-deps --no-index --find-links "$dist" --only-binary :all: --platform "$tags" \
		--dest "$work/$tags" onecopy
	case $tags:$(ls "$work/$tags") in
	*linux_*x86_64:*linux_*x86_64.whl | *linux_*aarch64:*linux_*aarch64.whl | macosx*:*-none-any.whl) echo "$tags: $(ls "$work/$tags")" ;;
	*) fail "$tags gets $(ls "$work/$tags")" ;;
	esac
done

echo "== the wheels' programs are static"
for m in x86_64 aarch64; do
	python3 -m zipfile -e "$(ls "$dist"/onecopy-*_$m.whl)" "$work/unpacked-$m"
	program=$(find "$work/unpacked-$m" -path '*.data/scripts/shmctl')
	file -b "$program" | grep -q 'statically linked' || fail "$m: $(file -b "$program")"
	chmod +x "$program"
	if [ "$m" = "$machine" ]; then
		"$program" version >/dev/null
	elif command -v "qemu-$m-static" >/dev/null; then
		"qemu-$m-static" "$program" version | grep linux/ || fail "qemu-$m-static shmctl version"
	else
		echo "$m: not run (apt-get install qemu-user-static)"
	fi
done

echo "== the source distribution and the source folder, without Go"
bare=$work/path
mkdir "$bare"
for tool in sh ls uname gcc ld; do ln -s "$(command -v $tool)" "$bare/" 2>/dev/null || true; done
for from in "$(ls "$dist"/onecopy-*.tar.gz)" ./python; do
	rm -rf "$work/sdist"
	python3 -m venv "$work/sdist"
	PATH=$bare "$work/sdist/bin/python" -m pip install --quiet "$from"
	use "$work/sdist"
	[ ! -e "$work/sdist/bin/shmctl" ] || fail "$from: a shmctl out of nowhere"
	echo "$from"
done
echo "test_wheels: all passed"
