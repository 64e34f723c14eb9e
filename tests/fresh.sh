#!/bin/sh
# Proves the README on a fresh machine: in a clean Debian root with nothing but what an installer gives, make and a
# cargo, the README's first command is typed as it stands there, and must end with a running server.
#
# The root has mounts, processes and a host name of its own, and shares the kernel and the network with this machine, so
# it runs at native speed. What it makes on the kernel is taken away by `make demo-clean`, and looked for.
set -eu

tree=$(cd "$(dirname "$0")/.." && pwd)
place=${CARGO_TARGET_DIR:-$tree/target}/fresh
# How long the README's command may take, in seconds.
limit=1500

fail() {
    echo "fresh: $*" >&2
    exit 1
}

# The first mirror of Debian's archive that this machine's apt uses; none is named in the tree.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1
}

# The README's first command, as a newcomer would copy it.
first_command() {
    awk '/^```/ { inside = !inside; next } inside { sub(/ *#.*/, ""); print; exit }' "$tree/README.md"
}

# What an installation at its usual place has on the kernel. Others, under a VSOS_ROOT, carry a suffix.
kernel_objects() {
    ls -d /sys/fs/cgroup/vsos /sys/fs/cgroup/*/vsos 2>/dev/null || :
    ls /sys/class/net | grep -E '^(vsbr0|vs-[0-9]+)$' || :
    nft list tables 2>/dev/null | grep -E ' vsos$' || :
}

# Makes the clean root of suite $1 at $2. A cargo comes with it where the release has one that is new enough.
make_root() {
    packages=make,ca-certificates
    [ "$1" = bookworm ] || packages=$packages,cargo
    echo "fresh: making a clean $1"
    echo "deb $(mirror) $1 main" |
        unshare --mount --propagation private \
            mmdebstrap --quiet --mode=root --variant=important --format=directory --include="$packages" "$1" "$2.part" -
    mv "$2.part" "$2"
}

# Runs in namespaces of its own: enters the root $1 and types $2 in the tree.
inside() {
    root=$1
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    for directory in /sys /dev; do
        mount --rbind "$directory" "$root$directory"
    done
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/tmp"
    # Name service and the ways of apt and cargo to their registries are the machine's; they are no part of the proof.
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    [ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    if [ ! -x "$root/usr/bin/cargo" ]; then
        for home in "${CARGO_HOME:-$HOME/.cargo}" "${RUSTUP_HOME:-$HOME/.rustup}"; do
            mkdir -p "$root$home"
            mount --bind "$home" "$root$home"
        done
    fi
    hostname fresh
    cd "$root"
    pivot_root . mnt
    umount -l /mnt
    cd /root/vsos
    # Where the bind mounts above have put it, whoever runs this.
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    export HOME=/root
    export LC_ALL=C.UTF-8
    unset CARGO_TARGET_DIR
    # A login's shell, not this script's: whatever it exported is not the newcomer's.
    exec sh -c "$2"
}

prove() {
    suite=$1
    root=$place/$suite
    mkdir -p "$place"
    rm -rf --one-file-system "$root" "$root.part"
    make_root "$suite" "$root"
    mkdir -p "$root/root/vsos"
    # What a clone of this tree has, with what is not committed yet.
    (cd "$tree" && git ls-files -z | tar --create --null --ignore-failed-read --files-from=-) | tar --extract --directory "$root/root/vsos"
    command=$(first_command)
    [ "$command" = "make demo" ] || fail "the README's first command is '$command'"
    before=$(kernel_objects)
    [ -z "$before" ] || fail "this machine has an installation of vsos that is up, and the fresh root would use the same names: $before"
    echo "fresh: $suite: # $command"
    # The kernel ends everything in the namespaces with their first process. The proof is the server, seen from outside
    # the demo, while the demo's word is still fresh.
    proof='vsctl=target/release/vsctl; $vsctl list && $vsctl exec demo1 -- hostname | grep -qx demo1 && $vsctl status demo1 --json | grep -q "\"state\": *\"running\""'
    status=0
    timeout --foreground "$limit" unshare --mount --pid --uts --fork --kill-child --propagation private \
        "$0" inside "$root" "$command && { $proof; said=\$?; make demo-clean; exit \$said; }" || status=$?
    [ "$status" = 0 ] || fail "$suite: '$command' did not end with a running server (exit status $status)"
    [ -z "$(kernel_objects)" ] || fail "$suite: not all was taken away: $(kernel_objects)"
    rm -rf --one-file-system "$root"
    echo "fresh: $suite: '$command' ended with a running server"
}

[ "$(id -u)" = 0 ] || fail "run as root"
case ${1:-} in
inside) shift && inside "$@" ;;
bookworm | trixie) prove "$1" ;;
*) fail "say bookworm or trixie" ;;
esac
