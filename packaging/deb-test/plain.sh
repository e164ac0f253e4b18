#!/bin/bash
# In a clean root without a running systemd: install, use, purge.
set -euo pipefail
. /deb-test/common.sh
make_model /srv/models/bert
snapshot >/tmp/before

install_deb
[ "$(stat -c %U:%G:%a /dev/shm/onecopy)" = onecopy:onecopy:755 ] || fail "tmpfiles.d has not made /dev/shm/onecopy"
getent passwd onecopy | grep -q ':/usr/sbin/nologin$' || fail "sysusers.d has not made a user without a shell"
[ "$(id -u onecopy)" -lt 1000 ] || fail "onecopy is not a system user: logind would remove its memory"
[ "$(stat -c %a /usr/share/man/man1)" = 755 ] || fail "the folder of the manual pages has mode $(stat -c %a /usr/share/man/man1)"
say "installed: $(dpkg-query -W onecopy), $(shmctl version | head -n 1)"

say "the program works"
as_onecopy shmctl load bert /srv/models/bert --mode 0755
as_onecopy shmctl ls
cmp /srv/models/bert/model.safetensors "$(as_onecopy shmctl path bert)/model.safetensors"
shmctl --dir /dev/shm/onecopy --trust-owner "$(id -u onecopy)" cat bert config.json | cmp - /srv/models/bert/config.json
as_onecopy shmctl exec bert -- sh -c 'test -r "$1"/config.json' - {}
as_onecopy shmctl gc
as_onecopy shmctl check
# It may find something amiss with this machine (1), but it must come to an end.
as_onecopy shmctl doctor >/tmp/doctor || [ $? = 1 ]
grep -q . /tmp/doctor || fail "doctor says nothing"
as_onecopy shmctl metrics | grep -q '^onecopy_models 1$' || fail "metrics does not count the model"

say "the manual pages"
for page in /usr/share/man/man1/shmctl*.gz; do
	LC_ALL=C.UTF-8 man --warnings -l "$page" >/dev/null 2>/tmp/man || fail "man $page"
	[ ! -s /tmp/man ] || fail "$page: $(cat /tmp/man)"
done
man -w shmctl-gc >/dev/null

say "completion of a model's name"
export ONECOPY_DIR=/dev/shm/onecopy ONECOPY_TRUST_OWNER=$(id -u onecopy)
[ "$(fish -c 'complete -C "shmctl stat b"' | cut -f 1)" = bert ] || fail "fish: $(fish -c 'complete -C "shmctl stat b"')"
got=$(bash -c '. /usr/share/bash-completion/bash_completion; . /usr/share/bash-completion/completions/shmctl
	COMP_WORDS=(shmctl stat b) COMP_CWORD=2 COMP_LINE="shmctl stat b" COMP_POINT=13 COMP_TYPE=9
	__start_shmctl 2>/dev/null; echo "${COMPREPLY[*]}"')
[ "${got%% *}" = bert ] || fail "bash: $got"
got=$(zsh -fc 'autoload -U compinit; compinit -u -d /tmp/zcompdump; echo $_comps[shmctl]')
[ "$got" = _shmctl ] || fail "zsh: $got"
unset ONECOPY_DIR ONECOPY_TRUST_OWNER

say "upgrade: the model stays"
install_deb
as_onecopy shmctl stat -q bert
say "remove: the model stays, the program goes"
dpkg -r onecopy >/dev/null
! command -v shmctl || fail "shmctl is still there"
[ -e /dev/shm/onecopy/v1/registry ] || fail "remove has taken the models"
say "a process that has the model mapped survives the purge"
install_deb
"${as[@]}" shmctl exec bert -- sleep infinity & # not the function: its shell would be $!
holder=$!
eventually sh -c 'shmctl --dir /dev/shm/onecopy --trust-owner $(id -u onecopy) ls --no-headers | grep -q bert'
dpkg -P onecopy >/tmp/purge.log 2>&1
grep -q 'still in use' /tmp/purge.log || fail "the purge took the user of a running process: $(cat /tmp/purge.log)"
kill -0 $holder || fail "the purge killed a process"
kill $holder
wait $holder || true
install_deb
dpkg -P onecopy
unchanged /tmp/before
