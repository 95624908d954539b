#!/usr/bin/env bash
# Three replicas by Relevo and by GlusterFS, on the same machine, the same file system and the same network,
# measured in turns with fio: over NBD for Relevo, with libgfapi for GlusterFS, which is the shortest way that it has.
#
#     bench/gluster.sh                 # in TMPDIR
#     DIR=/dev/shm bench/gluster.sh    # in memory
#
# Debian: fio iproute2 glusterfs-server (its service need not run). Variables: RELEVO (the program), SIZE (512m),
# ROUNDS (3), SECONDS_EACH (2), KEEP (1: leave the files).
#
# GlusterFS runs with its profile for images of virtual machines (`group virt`: sharding, eager locks, quorum).
. "$(dirname "$0")/lib.sh"
need glusterd glusterfs-server
fio --enghelp | grep -qw gfapi_async || die "this fio has no engine for GlusterFS"

machines 4
relevo_up 3

# Each machine has directories of its own under the names that glusterd insists on; the fourth one is the client.
for number in 1 2 3 4; do
    own=$work/g$number
    mkdir -p "$own"/{lib,log,run,brick}
    cp -a /var/lib/glusterd/groups "$own/lib/" 2>/dev/null
    program="glusterd -N -L WARNING"
    [ "$number" != 4 ] || program="sleep 100000"
    background ip netns exec "$prefix-$number" unshare --mount bash -c "
        mount --bind '$own/lib' /var/lib/glusterd && mount --bind '$own/log' /var/log/glusterfs &&
        mount --bind '$own/run' /run && mkdir -p /run/gluster && echo \$\$ >'$own/pid' && exec $program"
    until_true "glusterd's machine" test -s "$own/pid"
done
inside() { # inside MACHINE COMMAND...
    local number=$1; shift
    nsenter --net="/run/netns/$prefix-$number" --mount="/proc/$(cat "$work/g$number/pid")/ns/mnt" "$@"
}
gluster() { inside 1 gluster --mode=script "$@" >>"$work/log" 2>&1; }
connected() { [ "$(inside 1 gluster --mode=script peer status | grep -c '(Connected)')" = 2 ]; }
until_true "glusterd" gluster peer status
until_true "glusterd's peer" gluster peer probe "$(address 2)"
until_true "glusterd's peer" gluster peer probe "$(address 3)"
until_true "glusterd's peers" connected
bricks=()
for number in 1 2 3; do bricks+=("$(address "$number"):$work/g$number/brick/b"); done
until_true "a volume of GlusterFS" gluster volume create v replica 3 "${bricks[@]}" force
gluster volume set v group virt || say "this GlusterFS has no profile for virtual machines"
until_true "the volume of GlusterFS" gluster volume start v

engine=(--volume=v "--brick=$(address 1)" --filename=image)
say "filling ..."
fill relevo --ioengine=nbd --uri="$relevo_uri"
fio() { if [ -n "${machine:-}" ]; then inside "$machine" fio "$@"; else command fio "$@"; fi; }
machine=4
until_true "the image on GlusterFS" fill GlusterFS --ioengine=gfapi "${engine[@]}"
for round in $(seq "$rounds"); do
    say "round $round of $rounds"
    for fsync in 0 1; do
        for depth in 1 16; do
            machine=
            measure relevo "$depth" "$fsync" --ioengine=nbd --uri="$relevo_uri"
            machine=4
            measure "GlusterFS replica 3" "$depth" "$fsync" --ioengine=gfapi_async "${engine[@]}"
        done
    done
done
echo "three replicas of $size in ${DIR:-${TMPDIR:-/tmp}}; $(glusterd --version | head -1)"
table relevo
