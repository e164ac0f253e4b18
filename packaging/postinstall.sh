#!/bin/sh
# The user, the folder and the timer. In a container or chroot without systemd
# there is nothing to do.
set -e
if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers onecopy.conf || true
fi
if command -v systemd-tmpfiles >/dev/null; then
	systemd-tmpfiles --create onecopy.conf || true
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || true
	systemctl enable --now shmctl-gc.timer || true
fi
