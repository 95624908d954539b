#!/usr/bin/env bash
# Three replicas by Relevo and by QEMU's quorum driver over NBD, on the same machine, the same file system and the
# same network, measured in turns with fio's NBD engine.
#
#     bench/quorum-nbd.sh                 # in TMPDIR
#     DIR=/dev/shm bench/quorum-nbd.sh    # in memory
#
# Debian: fio iproute2 nbdkit qemu-utils qemu-system-common. Variables: RELEVO (the program), SIZE (512m),
# ROUNDS (3), SECONDS_EACH (2), KEEP (1: leave the files).
#
# The quorum driver is measured in two arrangements: all replicas on other machines, as in its documentation, and
# with one replica on the client's own machine, as Relevo has it. nbdkit serves through the page cache; a flush makes
# it durable. Relevo writes past the page cache where the file system can, so without fsync the comparison in
# memory is the one of like with like.
. "$(dirname "$0")/lib.sh"
need nbdkit nbdkit
need qemu-storage-daemon qemu-system-common

machines 4
relevo_up 3

serve() { # serve MACHINE FILE PORT
    truncate -s "$size" "$work/$2"
    background ip netns exec "$prefix-$1" nbdkit -f -i "$(address "$1")" -p "$3" -e v file "$work/$2"
    until_true "nbdkit" in_machine "$1" bash -c "exec 3<>/dev/tcp/$(address "$1")/$3"
}
remote() { # remote NODE-NAME MACHINE PORT
    echo "driver=nbd,node-name=$1,server.type=inet,server.host=$(address "$2"),server.port=$3,export=v"
}
quorum() { # quorum SOCKET BLOCKDEV BLOCKDEV BLOCKDEV, whose nodes are called c1, c2, c3
    background ip netns exec "$prefix-1" qemu-storage-daemon --blockdev "$2" --blockdev "$3" --blockdev "$4" \
        --blockdev driver=quorum,node-name=q,vote-threshold=2,read-pattern=fifo,children.0=c1,children.1=c2,children.2=c3 \
        --nbd-server addr.type=unix,addr.path="$work/$1" --export type=nbd,id=e,node-name=q,name=v,writable=on
    until_true "the quorum driver" test -S "$work/$1"
}

# Each quorum has files and servers of its own.
truncate -s "$size" "$work/a1"
serve 2 a2 10809
serve 3 a3 10809
quorum local.sock "driver=file,node-name=c1,filename=$work/a1" "$(remote c2 2 10809)" "$(remote c3 3 10809)"
local_uri="nbd+unix:///v?socket=$work/local.sock"
serve 4 b1 10810
serve 2 b2 10810
serve 3 b3 10810
quorum remote.sock "$(remote c1 4 10810)" "$(remote c2 2 10810)" "$(remote c3 3 10810)"
remote_uri="nbd+unix:///v?socket=$work/remote.sock"

say "filling ..."
for uri in "$relevo_uri" "$local_uri" "$remote_uri"; do fill "$uri" --ioengine=nbd --uri="$uri"; done
for round in $(seq "$rounds"); do
    say "round $round of $rounds"
    for fsync in 0 1; do
        for depth in 1 16; do
            measure relevo "$depth" "$fsync" --ioengine=nbd --uri="$relevo_uri"
            measure "quorum, 1 local and 2 remote" "$depth" "$fsync" --ioengine=nbd --uri="$local_uri"
            measure "quorum, 3 remote" "$depth" "$fsync" --ioengine=nbd --uri="$remote_uri"
        done
    done
done
echo "three replicas of $size in ${DIR:-${TMPDIR:-/tmp}}; $(qemu-storage-daemon --version | head -1)"
table relevo
