#!/bin/sh
# Installs the Debian packages of tests/packages that are missing, for the groups named as arguments.
#
# Nothing missing: nothing is done, and root is not needed. What cannot be mended here (no cargo, an old
# one, no root, no apt) ends in one line that says what to do. No service of a package is started or enabled.
set -eu

tree=$(dirname "$0")/..
list=$tree/tests/packages
. "$tree/tests/quiet.sh"

fail() {
    echo "setup: $*" >&2
    exit 1
}

# The oldest Rust that builds the tree stands in Cargo.toml, and only there.
check_cargo() {
    oldest=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$tree/Cargo.toml" | head -n 1)
    command -v cargo >/dev/null 2>&1 ||
        fail "cargo is missing: install Rust $oldest or newer (Debian 13: apt-get install cargo rustfmt rust-clippy; elsewhere: rustup)"
    found=$(cargo --version | cut -d ' ' -f 2)
    [ "$(printf '%s\n%s\n' "$oldest" "$found" | sort -V | head -n 1)" = "$oldest" ] ||
        fail "cargo $found is too old: vsos needs Rust $oldest or newer"
}

# Prints the packages of the groups in "$@".
wanted() {
    for group in "$@"; do
        awk -v group="$group" '$1 == group { print $2 }' "$list"
    done
}

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

check_cargo
missing=
command -v dpkg-query >/dev/null 2>&1 || {
    echo "setup: not a Debian system; these packages, or what they are called here, are needed:" $(wanted "$@")
    exit 0
}
for package in $(wanted "$@"); do
    installed "$package" || missing="$missing $package"
done

if [ -n "$missing" ]; then
    [ "$(id -u)" = 0 ] || fail "run as root, or install by hand:$missing"
    for package in $missing; do
        awk -v package="$package" '$2 == package { $1 = ""; sub(/^ /, "setup: install "); print; exit }' "$list"
    done
    export DEBIAN_FRONTEND=noninteractive
    trap quiet_end EXIT
    trap 'exit 130' INT TERM HUP
    quiet_begin
    # An index that fails to load (a third party's, say) matters only if the package is then not found.
    apt-get update -qq || echo "setup: apt-get update had errors, going on" >&2
    # shellcheck disable=SC2086 # a list of names
    apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
        fail "apt-get could not install:$missing"
fi
