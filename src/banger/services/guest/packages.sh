# packages NAME…
#
# Install packages by the package manager that there is, and leave nothing of what it has downloaded.
# 90: there is none.
set -e
if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    # What is installed is for machines of the image: nothing of it is to start here.
    policy=/usr/sbin/policy-rc.d
    if ! [ -e "$policy" ]; then
        trap 'rm -f -- "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    apt-get -q update
    apt-get -q -o Dpkg::Use-Pty=0 install -y --no-install-recommends -- "$@"
    apt-get -q clean
    rm -rf /var/lib/apt/lists/*
elif command -v apk >/dev/null; then
    apk add --no-cache -- "$@"
elif command -v dnf >/dev/null; then
    dnf install -y --setopt=install_weak_deps=False "$@" # dnf 5 takes no --
    dnf clean all
elif command -v zypper >/dev/null; then
    zypper --non-interactive install --no-recommends -- "$@"
    zypper clean --all
elif command -v pacman >/dev/null; then
    # Its archives have no older versions: what is installed must be as new.
    pacman -Syu --noconfirm --needed -- "$@"
    pacman -Scc --noconfirm
else
    exit 90
fi
