#!/bin/bash
# Installs the package in a clean Debian root, uses it, removes it, and requires that
# nothing is left:
#
#	packaging/test-deb.sh [dist/onecopy_0.1.0_amd64.deb]
#
# Twice: in a root where systemd is not running, like a container, and in one that it
# has booted, with the hardened timer unit, the mount unit and the units of
# examples/systemd really running. Needs root, a Debian mirror, and
#
#	apt-get install mmdebstrap systemd-container
#
# NSPAWN names another systemd-nspawn. The unpacked root is kept in bin/deb-root.tar.
set -euo pipefail
cd "$(dirname "$0")/.."
nspawn=${NSPAWN:-systemd-nspawn}
suite=${SUITE:-bookworm}
[ "$(id -u)" = 0 ] || { echo "test-deb: needs root: it makes a root filesystem" >&2; exit 1; }
for tool in mmdebstrap "$nspawn"; do
	command -v "$tool" >/dev/null || { echo "test-deb: $tool is missing: apt-get install mmdebstrap systemd-container" >&2; exit 1; }
done
arch=$(dpkg --print-architecture)
deb=${1:-$(find dist -name "onecopy_*_$arch.deb" -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d ' ' -f 2-)}
[ -f "$deb" ] || { echo "test-deb: no package for $arch in dist/: make deb" >&2; exit 1; }

base=bin/deb-root-$suite.tar
if [ ! -e "$base" ]; then
	echo "== making $base"
	mkdir -p bin
	mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,passwd,man-db,bash-completion,zsh,fish,python3,curl \
		"$suite" "${base%.tar}.new.tar" "${MIRROR:-http://deb.debian.org/debian}"
	mv "${base%.tar}.new.tar" "$base"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fresh() {
	rm -rf "$work/root"
	mkdir "$work/root"
	tar -xpf "$base" -C "$work/root" --exclude='./dev/*'
	mkdir "$work/root/deb-test"
	cp "$deb" "$work/root/deb-test/onecopy.deb"
	cp packaging/deb-test/* "$work/root/deb-test/"
}

echo "== $deb where systemd is not running"
fresh
unshare --mount --ipc --pid --fork --kill-child bash -euc '
	root=$1
	mount -t proc proc "$root/proc"
	mount -t tmpfs -o mode=755 tmpfs "$root/dev"
	for node in null zero random urandom; do
		touch "$root/dev/$node"
		mount --bind "/dev/$node" "$root/dev/$node"
	done
	ln -s /proc/self/fd "$root/dev/fd"
	mkdir "$root/dev/shm"
	mount -t tmpfs -o size=256m,mode=1777 tmpfs "$root/dev/shm"
	exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 /bin/bash /deb-test/plain.sh
' - "$work/root"

echo "== $deb where systemd is running"
fresh
cp "$work/root/deb-test/deb-test.service" "$work/root/etc/systemd/system/"
status=0
"$nspawn" --quiet --register=no --keep-unit --private-network --console=pipe -D "$work/root" \
	--boot systemd.unit=deb-test.service </dev/null || status=$?
cat "$work/root/deb-test/log"
[ "$status" = 0 ] || { echo "test-deb: FAILED inside the booted root (exit $status)" >&2; exit 1; }
echo "test-deb: all passed"
