#!/bin/sh
# The demo: boots two virtual servers from the busybox template and shows that each is a machine of its own.
#
# `show` may be run again and again: what is there is kept. `clean` takes away exactly what `show` made; it is
# written down, line by line and before it is made, in a file beside the demo's servers.
set -eu

programs=${VSOS_PROGRAMS:?run this by make demo or make demo-clean}
vsctl=$programs/vsctl
# VSOS_ROOT moves an installation; the demo's note moves with it.
state=${VSOS_ROOT:-}/var/lib/vsos
runtime=${VSOS_ROOT:-}/run/vsos
note=$state/made-by-demo
template=busybox
servers="demo1 demo2"

fail() {
    echo "demo: $*" >&2
    exit 1
}

say() {
    printf '\n== %s\n' "$*"
}

# Runs a command of vsctl and shows the line that a person would type.
run() {
    printf '# vsctl'
    printf ' %s' "$@"
    printf '\n'
    "$vsctl" "$@"
}

made() {
    grep -qxF "$1" "$note" 2>/dev/null
}

# Writes down what is about to be made.
remember() {
    mkdir -p "$(dirname "$note")"
    made "$1" || echo "$1" >>"$note"
}

exists() {
    "$vsctl" status "$1" >/dev/null 2>&1
}

running() {
    "$vsctl" status "$1" --json 2>/dev/null | grep -q '"state": *"running"'
}

# The first IPv4 address of a server.
address() {
    "$vsctl" exec "$1" -- ip -4 -o address show dev eth0 | awk '{ sub("/.*", "", $4); print $4; exit }'
}

make_template() {
    if "$vsctl" template show "$template" >/dev/null 2>&1; then
        echo "the template $template is there already"
        return
    fi
    remember "template $template"
    run template build "$template"
}

make_server() {
    if exists "$1"; then
        made "server $1" || fail "there is a server $1 already, and it is not the demo's: rename it first"
        echo "the server $1 is there already"
    else
        remember "server $1"
        run create "$1" --template "$template" --memory 128M --cpuset 0 --pids 200
    fi
    running "$1" || run start "$1"
}

show() {
    [ "$(id -u)" = 0 ] || fail "run as root: only root makes virtual servers"
    # An installation that nobody had before goes with the demo.
    [ -e "$state" ] || remember installation
    say "A template: the root that servers are made from"
    make_template
    say "Two servers of 128 MiB and one CPU each"
    for name in $servers; do
        make_server "$name"
    done
    say "What this host runs"
    run list
    say "Inside, only its own processes show"
    run exec demo1 -- ps
    say "Its memory and its CPUs are what it was given"
    run exec demo1 -- free -m
    run exec demo1 -- nproc
    say "It is up since its own start"
    run exec demo1 -- uptime
    say "It has an address and a default route of its own"
    run exec demo1 -- ip address show dev eth0
    gateway=$("$vsctl" exec demo1 -- ip -4 route show default | awk '{ print $3; exit }')
    say "It reaches its gateway"
    run exec demo1 -- ping -c 1 -W 5 "$gateway"
    say "It reaches the other server"
    run exec demo1 -- ping -c 1 -W 5 "$(address demo2)"
    say "Now enter it"
    cat <<END
    $vsctl enter demo1        a shell inside; exit leaves it
    $vsctl console demo1      its console; ^a q leaves it
    $vsctl top                all servers on one screen; q leaves it
    make demo-clean           takes away all that the demo made
END
}

clean() {
    [ -e "$note" ] || {
        echo "demo: nothing was made, or all of it is gone"
        return 0
    }
    [ "$(id -u)" = 0 ] || fail "run as root"
    for name in $servers; do
        if made "server $name" && exists "$name"; then
            run destroy --force "$name"
        fi
    done
    if made "template $template" && "$vsctl" template show "$template" >/dev/null 2>&1; then
        # Refused while a server that is not the demo's uses it; then it stays with its user.
        run template remove "$template" || echo "demo: the template stays: a server uses it" >&2
    fi
    if made installation && [ -z "$("$vsctl" list -a -H)$(ls "$state/templates" 2>/dev/null)" ]; then
        rm -rf --one-file-system "$state" "$runtime"
    fi
    rm -f "$note"
}

case ${1:-} in
show) show ;;
clean) clean ;;
*) fail "say show or clean" ;;
esac
