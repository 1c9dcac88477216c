#!/usr/bin/env bash
# Installs Debian packages by name, if they are not there already: scripts/apt.sh NAME…
# Needs root, or sudo without a password. No service is started by it, and no database cluster made.
set -euo pipefail

missing=()
for name in "$@"; do
    if [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" != installed ]; then
        missing+=("$name")
    fi
done
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
        echo "These packages are missing, and installing them needs root: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null; then
    echo "These packages are missing, and this machine has no apt-get: ${missing[*]}" >&2
    exit 1
fi

guard=/usr/sbin/policy-rc.d
if [ ! -e $guard ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $guard >/dev/null
    "${as_root[@]}" chmod 755 $guard
    trap '"${as_root[@]}" rm -f "$guard"' EXIT
fi
# PostgreSQL's package would otherwise make a cluster that starts with the machine.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    "${as_root[@]}" mkdir -p /etc/postgresql-common/createcluster.d
    echo 'create_main_cluster = false' | "${as_root[@]}" tee /etc/postgresql-common/createcluster.d/kassa.conf >/dev/null
fi

echo "Installing Debian packages: ${missing[*]}"
apt_get() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@"; }
install() { apt_get install --no-install-recommends -y "${missing[@]}" >/dev/null </dev/null; }
# The lists of a bare machine are empty or old; they are read only when it does not go without.
install 2>/dev/null || { apt_get update && install; }
