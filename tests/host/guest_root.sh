#!/bin/sh
# Makes the root file system of the guest host as an archive, from Debian's packages and from what
# this checkout has. Run as root of namespaces of its own: the tree is in memory, and goes with them.
#
# usage: guest_root.sh SRV OUT    SRV: a folder for the guest's /srv, with `wheels` in it
#        guest_root.sh finish TREE       (mmdebstrap calls it so, as its last step)
set -eu

packages=ca-certificates,iproute2,procps
# What systemd and its friends take to run a host as people have it: udev, which gives /dev/kvm to
# its group, logind, the resolver, the bus.
packages=$packages,systemd-sysv,systemd-resolved,libnss-resolve,libpam-systemd,udev,dbus,kmod
# What banger calls, and Python for its wheel.
packages=$packages,python3,python3-venv,qemu-system-x86,qemu-utils,passt,mmdebstrap,uidmap
packages=$packages,e2fsprogs,git,skopeo,openssh-client,nftables
# What tests look with.
packages=$packages,dmsetup,iperf3,iputils-ping,sudo
# What tests of the integration suite need that are run in it.
packages=$packages,busybox-static,docker-registry,openssl,btrfs-progs,xfsprogs

finish() {
    cp --sparse=always --recursive "$SRV/." "$1/srv"
    chmod -R a+rX "$1/srv"
    chroot "$1" python3 -m venv /opt/banger
    chroot "$1" /opt/banger/bin/pip --disable-pip-version-check install --quiet \
        --no-index --find-links /srv/wheels banger
    for program in banger bangerd; do
        ln -s /opt/banger/bin/$program "$1/usr/local/bin/$program"
    done
    chroot "$1" useradd --create-home --shell /bin/bash --groups kvm alice
    # Nobody logs in at a terminal, and packages are never renewed.
    for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer \
        e2scrub_all.timer e2scrub_reap.service systemd-timesyncd.service getty.target \
        docker-registry.service; do
        ln -sf /dev/null "$1/etc/systemd/system/$unit"
    done
    # What mmdebstrap has from the machine it ran on.
    : >"$1/etc/machine-id"
    rm -f "$1/etc/resolv.conf"
    ln -s ../run/systemd/resolve/stub-resolv.conf "$1/etc/resolv.conf"
}

if [ "$1" = finish ]; then
    finish "$2"
    exit
fi

export SRV="$1"
out=$2
tree=$(dirname "$out")/guest-root
mkdir -p "$tree"
mount -t tmpfs -o mode=755 none "$tree"
mmdebstrap --mode=root --variant=minbase --format=directory --include="$packages" \
    --customize-hook="sh $0 finish \"\$1\"" bookworm "$tree"
# mmdebstrap's own tar knows no holes, and a file system in /srv is mostly holes.
exec tar --create --sparse --numeric-owner --xattrs --xattrs-include='*' \
    --file "$out" --directory "$tree" .
