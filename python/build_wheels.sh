#!/bin/sh
# Wheels for Linux on x86_64 and aarch64, each with the static shmctl, one without it
# for everything else, and the source distribution, into dist/ (or $1). Needs Go, and
# hatchling from the Python package index once; the rest needs no network.
set -eu
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
python=bin/venv-wheels/bin/python
if [ ! -x $python ]; then
	python3 -m venv bin/venv-wheels
	$python -m pip install --quiet --disable-pip-version-check 'hatchling>=1.18'
fi
python=$PWD/$python
packaging/build.sh binaries
rm -f "$out"/onecopy-*.whl "$out"/onecopy-*.tar.gz
cd python
for pair in amd64:x86_64 arm64:aarch64; do
	# A static program runs with any libc: the tag of glibc 2.17 and that of musl.
	ONECOPY_SHMCTL="../dist/shmctl-linux-${pair%:*}" \
		ONECOPY_WHEEL_TAG="manylinux_2_17_${pair#*:}.manylinux2014_${pair#*:}.musllinux_1_1_${pair#*:}" \
		"$python" -m hatchling build --target wheel --directory "$out"
done
"$python" -m hatchling build --target wheel --target sdist --directory "$out"
