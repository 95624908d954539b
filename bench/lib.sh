# What the comparisons share; sourced, not run. Machines are network namespaces on one bridge; everything that was
# made is taken away when the script ends.

set -u

relevo=${RELEVO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/target/release/relevo}
size=${SIZE:-512m}
rounds=${ROUNDS:-3}
seconds=${SECONDS_EACH:-2}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null || die "$1 is not here (Debian: apt-get install $2)"
}

[ "$(id -u)" = 0 ] || die "network namespaces need root"
[ -x "$relevo" ] || die "$relevo is not here: cargo build --release, or set RELEVO"
need ip iproute2
need fio fio
fio --enghelp | grep -qw nbd || die "this fio has no NBD engine"

work=$(mktemp -d "${DIR:-${TMPDIR:-/tmp}}/relevo-bench-XXXXXX") || exit 1
results=$work/results
prefix=rb$$
bridge=br$$
children=()
namespaces=()

background() { "$@" >>"$work/log" 2>&1 & children+=($!); }

clean_up() {
    local namespace pid
    exec 2>/dev/null # the shell's words about what it kills
    for pid in ${children[@]+"${children[@]}"}; do kill "$pid" 2>/dev/null; done
    sleep 0.2
    # What forked away is still in its namespace.
    for namespace in ${namespaces[@]+"${namespaces[@]}"}; do
        for _ in 1 2 3 4 5; do
            for pid in $(ip netns pids "$namespace" 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
            sleep 0.1
        done
        ip netns del "$namespace"
    done
    for pid in ${children[@]+"${children[@]}"}; do kill -9 "$pid" 2>/dev/null; done
    wait 2>/dev/null
    ip link del "$bridge" 2>/dev/null
    if [ -n "${KEEP:-}" ]; then echo "files are kept in $work"; else rm -rf "$work"; fi
}
trap clean_up EXIT
trap 'exit 1' INT TERM

in_machine() { local number=$1; shift; ip netns exec "$prefix-$number" "$@"; }
address() { echo "10.93.0.$1"; }

# machines COUNT: namespaces with a cable each to one bridge; all systems get the same congestion control.
machines() {
    local number
    ip link add "$bridge" type bridge forward_delay 0 && ip link set "$bridge" up || exit 1
    for number in $(seq "$1"); do
        ip netns add "$prefix-$number" || exit 1
        namespaces+=("$prefix-$number")
        ip link add "v$number-$$" type veth peer name eth0 netns "$prefix-$number" || exit 1
        ip link set "v$number-$$" master "$bridge" up
        ip -n "$prefix-$number" address add "$(address "$number")/24" dev eth0
        ip -n "$prefix-$number" link set lo up
        ip -n "$prefix-$number" link set eth0 up
        in_machine "$number" sysctl -qw "net.ipv4.tcp_congestion_control=${CONGESTION:-cubic}" 2>/dev/null ||
            in_machine "$number" sysctl -qw net.ipv4.tcp_congestion_control=reno
    done
}

until_true() { # until_true WHAT COMMAND...: looks for 20 s
    local what=$1; shift
    for _ in $(seq 200); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
    tail -5 "$work/log" >&2
    die "waited 20 s for $what"
}

# relevo_up COUNT: a cluster of data nodes on the first machines with a volume of as many replicas, primary on the
# first. Sets relevo_uri.
relevo_up() {
    local number token
    for number in $(seq "$1"); do
        mkdir "$work/n$number"
        background ip netns exec "$prefix-$number" "$relevo" --state-dir "$work/n$number" \
            daemon --no-devices --log-level warn
        until_true "a daemon" "$relevo" --state-dir "$work/n$number" token --help
        until_true "a daemon's socket" test -S "$work/n$number/relevo.sock"
    done
    "$relevo" --state-dir "$work/n1" init --name bench --node n1 --path "lan=$(address 1)" >>"$work/log" || exit 1
    for number in $(seq 2 "$1"); do
        token=$("$relevo" --state-dir "$work/n1" token --json | grep -o '"token": *"[^"]*"' | cut -d'"' -f4)
        "$relevo" --state-dir "$work/n$number" join "$token" --node "n$number" \
            --path "lan=$(address "$number")" >>"$work/log" || exit 1
    done
    until_true "a volume" "$relevo" --state-dir "$work/n1" volume create v --size "${size^^}"
    "$relevo" --state-dir "$work/n1" primary v >>"$work/log" || exit 1
    "$relevo" --state-dir "$work/n1" wait-sync v >>"$work/log" || exit 1
    relevo_uri="nbd+unix:///v?socket=$work/n1/nbd/v.sock"
}

# fill NAME FIO-ARGUMENTS...: every block is written once, so that no file system has to find room later.
fill() {
    local name=$1; shift
    fio --name=fill "$@" --rw=write --bs=1m --iodepth=4 --size="$size" --end_fsync=1 --output-format=terse \
        >>"$work/log" 2>&1 || die "filling $name failed: $(tail -3 "$work/log")"
}

# measure NAME DEPTH FSYNC FIO-ARGUMENTS...: 4 KiB random writes; FSYNC 1: each followed by a flush.
measure() {
    local name=$1 depth=$2 fsync=$3; shift 3
    fio --name=write "$@" --rw=randwrite --bs=4k --iodepth="$depth" --fsync="$fsync" --size="$size" \
        --time_based --runtime="$seconds" --output-format=terse --terse-version=3 2>>"$work/log" |
        awk -F';' -v name="$name" -v depth="$depth" -v fsync="$fsync" \
            '$49 > 0 { printf "%s\t%s\t%s\t%s\t%s\n", name, depth, fsync, $49, $81 }' >>"$results"
}

# table BASE: medians of all rounds; ratios are those of BASE to the others.
table() {
    sort -t "$(printf '\t')" -k2,2n -k3,3n -k1,1 -k4,4n "$results" | awk -F'\t' -v base="$1" '
        { cell = $2 FS $3 FS $1; if (!(cell in count)) order[++cells] = cell
          value[cell, ++count[cell]] = $4; latency[cell, count[cell]] = $5 }
        END {
            for (i = 1; i <= cells; i++) {
                cell = order[i]; middle = int((count[cell] + 1) / 2)
                median[cell] = value[cell, middle]; time[cell] = latency[cell, middle]
            }
            printf "%-6s %-6s %-38s %12s %12s %8s\n", "depth", "fsync", "", "writes/s", "mean us", base "/it"
            for (i = 1; i <= cells; i++) {
                cell = order[i]; split(cell, part, FS)
                own = median[part[1] FS part[2] FS base]
                printf "%-6s %-6s %-38s %12.0f %12.0f %8s\n", part[1], part[2], part[3], median[cell], time[cell],
                    part[3] == base ? "" : sprintf("%.2f", own / median[cell])
            }
        }'
}
