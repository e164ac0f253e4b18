#!/bin/sh
# Static programs and Debian packages for amd64 and arm64, into dist/:
#
#	packaging/build.sh binaries
#	packaging/build.sh deb
#
# VERSION is by default that of the Python package. Two builds of one commit give
# the same bytes.
set -eu
cd "$(dirname "$0")/.."
# Later versions need modules that proxy.golang.org refuses to serve.
nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2
arches="amd64 arm64"
VERSION=${VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' python/src/onecopy/__init__.py)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export VERSION SOURCE_DATE_EPOCH

binaries() {
	mkdir -p dist
	for arch in $arches; do
		echo "dist/shmctl-linux-$arch"
		CGO_ENABLED=0 GOOS=linux GOARCH=$arch go build -trimpath -buildvcs=auto \
			-ldflags "-s -w -X main.version=$VERSION" -o "dist/shmctl-linux-$arch" ./cmd/shmctl
	done
	(cd dist && sha256sum shmctl-linux-*) >dist/SHA256SUMS
}

# files makes what the packages hold besides the program, in bin/package.
files() {
	rm -rf bin/package
	mkdir -p bin/package/man bin/package/completions
	for page in docs/man/*.1; do
		case $page in *powershell*) continue ;; esac
		gzip -9nc "$page" >"bin/package/man/${page##*/}.gz"
	done
	for name in bash:shmctl.bash zsh:_shmctl fish:shmctl.fish; do
		go run ./cmd/shmctl completion "${name%%:*}" >"bin/package/completions/${name#*:}"
	done
	gzip -9nc CHANGELOG.md >bin/package/changelog.gz
	printf 'onecopy (%s) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- The onecopy authors <onecopy@example.org>  %s\n' \
		"$VERSION" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")" | gzip -9n >bin/package/changelog.Debian.gz
}

deb() {
	binaries
	files
	for arch in $arches; do
		GOARCH= ARCH=$arch go run "$nfpm" package --config packaging/nfpm.yaml --packager deb --target dist/
	done
}

case "${1:-}" in
binaries | deb) "$1" ;;
*)
	sed -n 's/^# \{0,1\}//; 2,9p' "$0" >&2
	exit 2
	;;
esac
