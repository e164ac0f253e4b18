#!/bin/bash
# In a clean root that systemd has booted: the units really run.
set -euo pipefail
. /deb-test/common.sh
trap '[ $? = 0 ] || { systemctl --no-pager status shmctl-gc.timer shmctl-gc.service; journalctl -q -b --no-pager | tail -n 40; }' EXIT
# systemd-nspawn mounts a boot id of its own over the kernel's; in the unit, which gets a
# fresh /proc, the kernel's would show again: times of "another boot", as on no real host.
umount /proc/sys/kernel/random/boot_id
make_model /srv/models/bert
snapshot >/tmp/before

install_deb
systemctl is-active --quiet shmctl-gc.timer || fail "the timer does not run after the installation"
systemctl is-enabled --quiet shmctl-gc.timer || fail "the timer is not enabled"
! systemctl is-enabled --quiet run-onecopy.mount || fail "the mount unit is optional, yet enabled"
systemd-analyze verify shmctl-gc.service shmctl-gc.timer run-onecopy.mount 2>&1 | tee /tmp/verify
[ ! -s /tmp/verify ] || fail "systemd-analyze verify"
say "systemd-analyze security: $(systemd-analyze security --no-pager shmctl-gc.service | tail -n 1)"

say "nothing to do: the service is not started"
systemctl start shmctl-gc.service
[ "$(systemctl show -P ConditionResult shmctl-gc.service)" = no ] || fail "it started without a registry"

say "the timer removes what has expired, under the service's sandbox"
as_onecopy shmctl load --mode 0755 bert /srv/models/bert
as_onecopy shmctl config set ttl=1s
eventually sh -c '[ -z "$(shmctl --dir /dev/shm/onecopy --trust-owner $(id -u onecopy) ls -q)" ]'
[ "$(systemctl show -P Result shmctl-gc.service)" = success ] || fail "$(systemctl status shmctl-gc.service)"
[ "$(systemctl show -P ExecMainStatus shmctl-gc.service)" = 0 ] || fail "$(systemctl status shmctl-gc.service)"
as_onecopy shmctl check
as_onecopy shmctl config set ttl=never

say "the same sandbox, a replaced generation whose last reader was killed"
as_onecopy shmctl load bert /srv/models/bert
# A reader that keeps generation 1 until it is killed.
"${as[@]}" shmctl exec bert -- sleep infinity & # not the function: its shell would be $!
holder=$!
eventually sh -c 'grep -qs sleep /proc/'$holder'/cmdline'
as_onecopy shmctl load --replace bert /srv/models/bert
[ "$(find /dev/shm/onecopy/v1/m -name '*.manifest' | wc -l)" = 2 ] || fail "the replaced generation is gone while it is in use"
kill -9 $holder
wait $holder 2>/dev/null || true
systemctl start shmctl-gc.service
[ "$(find /dev/shm/onecopy/v1/m -name '*.manifest' | wc -l)" = 1 ] || fail "the service has not collected the replaced generation"
as_onecopy shmctl check

say "what the sandbox forbids is forbidden"
# probe SCRIPT [SED]: by a service that has all but the start of shmctl-gc.service, less
# what the sed script takes away.
probe() {
	echo "$1" >/deb-test/probe
	sed 's|^ExecStart=.*|ExecStart=/bin/sh -e /deb-test/probe|; /^Condition/d' /usr/lib/systemd/system/shmctl-gc.service |
		sed "${2:-}" >/run/systemd/system/probe.service
	systemctl daemon-reload
	systemctl start probe.service 2>/dev/null
}
# forbidden SCRIPT: the same user may do it without the sandbox, and not in it.
forbidden() {
	probe "$1" '/^NoNewPrivileges/,$d' || fail "does not work without the sandbox either: $1"
	! probe "$1" || fail "allowed in the sandbox: $1"
}
probe 'echo x >/dev/shm/onecopy/probe; rm /dev/shm/onecopy/probe' || fail "the registry is not writable"
probe 'python3 -c "import mmap; mmap.mmap(-1, 4096, prot=3)"' || fail "Python does not start"
forbidden 'python3 -c "import mmap; mmap.mmap(-1, 4096, prot=7)"'
forbidden 'python3 -c "import socket; socket.socket()"'
forbidden 'unshare --user true'
forbidden 'echo x >/dev/shm/probe; rm /dev/shm/probe'
mkdir -m 777 /srv/probe
forbidden 'echo x >/srv/probe/x; rm /srv/probe/x'
rmdir /srv/probe
rm /run/systemd/system/probe.service
systemctl daemon-reload
systemctl reset-failed

say "the journal has what was removed, and no line for each round"
journalctl -q -u shmctl-gc.service --no-pager | tee /tmp/journal
grep -q 'shmctl\[' /tmp/journal || fail "what was removed is not in the journal"
! grep 'systemd\[1\]' /tmp/journal || fail "each round is in the journal"

say "the optional mount"
systemctl enable --quiet --now run-onecopy.mount
findmnt -no OPTIONS /run/onecopy
findmnt -no OPTIONS /run/onecopy | grep -q huge=advise || fail "no huge=advise"
[ "$(stat -c %U:%a /run/onecopy)" = onecopy:755 ] || fail "/run/onecopy is $(stat -c %U:%a /run/onecopy)"
echo ONECOPY_DIR=/run/onecopy >>/etc/default/onecopy
as_onecopy env ONECOPY_DIR=/run/onecopy shmctl load --mode 0755 bert /srv/models/bert
as_onecopy env ONECOPY_DIR=/run/onecopy shmctl config set ttl=1s
eventually sh -c '[ -z "$(shmctl --dir /run/onecopy --trust-owner $(id -u onecopy) ls -q)" ]'
sed -i '/^ONECOPY_DIR/d' /etc/default/onecopy
systemctl disable --quiet --now run-onecopy.mount

say "examples/systemd"
cp /usr/share/doc/onecopy/examples/systemd/*.service /etc/systemd/system/
cp /usr/share/doc/onecopy/examples/serve.py /srv/serve.py
as_onecopy shmctl rm --yes bert
systemctl daemon-reload
systemd-analyze verify /etc/systemd/system/warm.service /etc/systemd/system/serve@.service 2>&1 | tee /tmp/verify
[ ! -s /tmp/verify ] || fail "systemd-analyze verify"
systemctl start serve@8001 serve@8002 serve@8003
systemctl is-active --quiet warm.service || fail "warm.service: $(systemctl status warm.service)"
sum=$(sha256sum /srv/models/bert/model.safetensors | cut -d ' ' -f 1)
for port in 8001 8002 8003; do
	eventually curl -sf "http://127.0.0.1:$port/healthz"
	curl -sf "http://127.0.0.1:$port/" | grep -q "$sum" || fail "serve@$port does not serve the model"
done
as_onecopy shmctl holders bert
[ "$(as_onecopy shmctl holders bert --no-headers | wc -l)" = 3 ] || fail "want three holders"
main=$(systemctl show -P MainPID serve@8002)
kill -9 "$main"
eventually sh -c "[ \$(systemctl show -P MainPID serve@8002) != $main ]"
eventually curl -sf http://127.0.0.1:8002/healthz
[ "$(as_onecopy shmctl holders bert --no-headers | wc -l)" = 3 ] || fail "want three holders after a restart"
as_onecopy shmctl ls
systemctl stop 'serve@*' warm.service
rm /etc/systemd/system/warm.service /etc/systemd/system/serve@.service /srv/serve.py
systemctl daemon-reload

say "an upgrade keeps a timer that somebody has disabled"
systemctl disable --quiet --now shmctl-gc.timer
install_deb
! systemctl is-enabled --quiet shmctl-gc.timer || fail "the upgrade enabled it"
! systemctl is-active --quiet shmctl-gc.timer || fail "the upgrade started it"
systemctl enable --quiet --now shmctl-gc.timer
install_deb
systemctl is-active --quiet shmctl-gc.timer || fail "the upgrade stopped it"

dpkg -P onecopy >/tmp/purge.log 2>&1 || fail "$(cat /tmp/purge.log)"
! systemctl is-active --quiet shmctl-gc.timer || fail "the timer outlives the package"
systemctl reset-failed
unchanged /tmp/before
