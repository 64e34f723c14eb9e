#!/bin/sh
# Sourced by the scripts here that install packages: between `quiet_begin` and `quiet_end` no service is started by what is
# installed, and what enabled itself for the next boot is disabled again. This host has not asked for it.
#
# `quiet_end` may be called again, and without `quiet_begin`.
set -eu

quiet_policy=/usr/sbin/policy-rc.d
quiet_scratch=

quiet_enabled() {
    find /etc/systemd/system /etc/rc?.d -type l 2>/dev/null | sort
}

quiet_begin() {
    quiet_scratch=$(mktemp -d)
    quiet_enabled >"$quiet_scratch/enabled"
    # Asked before anything is started or restarted (invoke-rc.d(8)).
    [ ! -e "$quiet_policy" ] || cp -a "$quiet_policy" "$quiet_scratch/policy"
    printf '#!/bin/sh\nexit 101\n' >"$quiet_scratch/none"
    chmod 0755 "$quiet_scratch/none"
    mv "$quiet_scratch/none" "$quiet_policy"
}

quiet_end() {
    [ -n "$quiet_scratch" ] || return 0
    quiet_enabled | comm -13 "$quiet_scratch/enabled" - | while read -r link; do
        rm -f "$link"
        rmdir --ignore-fail-on-non-empty "${link%/*}"
    done
    rm -f "$quiet_policy"
    [ ! -e "$quiet_scratch/policy" ] || mv "$quiet_scratch/policy" "$quiet_policy"
    rm -rf "$quiet_scratch"
    quiet_scratch=
}
