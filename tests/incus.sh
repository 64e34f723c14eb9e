#!/bin/sh
# Installs Incus for the bench, where it can be had: from the host's own archive, or from its backports.
#
# The address of the archive is the one that the host's apt uses. A list of sources with the backports is there only
# while this runs, with lists and packages in a directory of its own: the host's apt does not change. No daemon is
# started, and none will be at the next boot. What cannot be had ends in one line with the reason, and exit status 3.
set -eu

! command -v incusd >/dev/null 2>&1 && ! test -x /usr/libexec/incus/incusd || exit 0

unavailable() {
    echo "incus: $*"
    exit 3
}

[ "$(id -u)" = 0 ] || unavailable "only root can install it"
command -v apt-get >/dev/null 2>&1 || unavailable "no apt-get on this system"

. "$(dirname "$0")/quiet.sh"
scratch=$(mktemp -d)

finish() {
    status=$?
    trap - EXIT INT TERM HUP
    quiet_end
    rm -rf "$scratch"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP
quiet_begin

export DEBIAN_FRONTEND=noninteractive
install_incus() {
    apt-get "$@" install -y -qq --no-install-recommends incus-base incus-client >"$scratch/log" 2>&1 ||
        unavailable "apt-get could not install it: $(grep '^E:' "$scratch/log" | head -n 1)"
}

if [ -n "$(apt-cache madison incus-base 2>/dev/null)" ]; then
    install_incus
else
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ -n "$codename" ] || unavailable "this system has no codename to look for backports of"
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk '$3 == "main" { print $1, $2 }' | sort -u >"$scratch/own"
    uri=$(awk -v suite="$codename" '$2 == suite { print $1; exit }' "$scratch/own")
    [ -n "$uri" ] || unavailable "this system's apt names no archive of $codename"
    # Beside the backports what the system has: dependencies are the system's own where they are new enough.
    { cat "$scratch/own"; echo "$uri $codename-backports"; } |
        awk -v suite="$codename" 'index($2, suite) == 1 { print "deb", $1, $2, "main" }' >"$scratch/list"
    mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
    # apt's own user fetches.
    chmod 0755 "$scratch"
    set -- -o "Dir::Etc::sourcelist=$scratch/list" -o Dir::Etc::sourceparts=/dev/null \
        -o "Dir::State::lists=$scratch/lists" -o "Dir::Cache=$scratch/cache" -o APT::Sandbox::User=root
    apt-get "$@" update -qq >"$scratch/log" 2>&1 ||
        unavailable "the backports cannot be reached: $(grep '^[EW]:' "$scratch/log" | head -n 1)"
    install_incus "$@" -t "$codename-backports"
fi
