# Shared by plain.sh and booted.sh, which run in the clean root.
trap 'echo "FAILED: line $LINENO: $BASH_COMMAND" >&2' ERR
say() { echo "-- $*"; }
fail() {
	echo "FAILED: $*" >&2
	exit 1
}

# What is there, with its owner, mode and contents, except what dpkg, ld.so and the
# running system keep for themselves.
snapshot() {
	find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /deb-test \
		-o -path /var/lib/dpkg -o -path /var/log -o -path /var/cache -o -path /var/tmp -o -path /root \
		-o -path /var/lib/systemd/random-seed -o -path /var/lib/systemd/timers \) -prune \
		-o -printf '%p %y %m %u:%g %s %l\n' | grep -vE '^(/|/etc|/etc/(passwd-|group-|shadow-|gshadow-|\.pwd\.lock)|/var/lib|/var/lib/systemd) ' | sort
	sha256sum /etc/passwd /etc/group /etc/shadow /etc/gshadow
	dpkg-query -W onecopy 2>/dev/null || true
	find /dev/shm /run/onecopy -mindepth 1 2>/dev/null || true
}

# unchanged BEFORE: nothing is left.
unchanged() {
	snapshot >/tmp/after
	diff "$1" /tmp/after || fail "this is left after the purge (> new, < missing)"
	say "nothing is left after the purge"
}

install_deb() { dpkg -i /deb-test/onecopy.deb >/tmp/dpkg.log 2>&1 || fail "dpkg -i: $(cat /tmp/dpkg.log)"; }

# A model of two files.
make_model() {
	mkdir -p "$1"
	head -c 3000000 /dev/urandom >"$1/model.safetensors"
	echo '{"made": "by the test"}' >"$1/config.json"
}

# as_onecopy COMMAND: as the user of the system registry.
as=(setpriv --reuid onecopy --regid onecopy --clear-groups env ONECOPY_DIR=/dev/shm/onecopy)
as_onecopy() { "${as[@]}" "$@"; }

# eventually COMMAND: until it succeeds; only a dead system makes it fail.
eventually() {
	local _
	for _ in $(seq 1200); do
		! "$@" >/dev/null 2>&1 || return 0
		sleep 0.1
	done
	fail "never came true: $*"
}
