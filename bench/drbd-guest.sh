#!/usr/bin/env bash
# Two replicas by Relevo and by the DRBD 8.4 that is in Linux, in one QEMU guest with a stock Debian kernel: the same
# RAM disks under both, protocol C, both replicas of each in the same kernel, connected over loopback.
#
#     bench/drbd-guest.sh
#
# Debian: fio qemu-system-x86 drbd-utils cpio kmod xz-utils; the kernel image and busybox are downloaded with apt-get
# and unpacked, not installed. The guest sees the host's root file system, read-only. Variables: RELEVO (the
# program), KERNEL (package of the kernel image), MEMORY (3G), SECONDS_EACH (3), ROUNDS (3), ACCEL (kvm where it
# works, else tcg).
#
# Without KVM every instruction is translated (TCG), which makes programs and their system calls dearer than what a
# kernel does by itself, and TLS without the processor's help dearer still: DRBD is in the kernel and does not
# encrypt. The last lines say where the processor's time went.
set -u
self=$(realpath "$0")
relevo=${RELEVO:-$(dirname "$self")/../target/release/relevo}
seconds=${SECONDS_EACH:-3}
rounds=${ROUNDS:-3}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# ---- inside the guest ------------------------------------------------------------------------------------------

drbd_up() {
    local minor name
    for minor in 0 1; do
        name=r$minor
        drbdmeta --force "$minor" v08 "/dev/ram$minor" internal create-md >>/tmp/log 2>&1 ||
            die "create-md: $(tail -1 /tmp/log)"
        "$drbdsetup" new-resource "$name" && "$drbdsetup" new-minor "$name" "$minor" 0 &&
            "$drbdsetup" attach "$minor" "/dev/ram$minor" "/dev/ram$minor" internal || die "attach $minor"
    done
    "$drbdsetup" connect r0 ipv4:127.0.0.1:7788 ipv4:127.0.0.1:7789 --protocol=C || die "connect"
    "$drbdsetup" connect r1 ipv4:127.0.0.1:7789 ipv4:127.0.0.1:7788 --protocol=C || die "connect"
    sleep 1
    "$drbdsetup" primary 0 --force || die "primary"
    for _ in $(seq 120); do grep -q 'UpToDate/UpToDate' /proc/drbd && return; sleep 0.5; done
    die "DRBD does not get in sync"
}

relevo_up() {
    local name token
    for name in one two; do
        mkdir "/tmp/$name"
        "$relevo" --state-dir "/tmp/$name" daemon --device-dir "/tmp/$name/dev" --log-level warn \
            2>>/tmp/log & eval "pid_$name=\$!"
        for _ in $(seq 300); do [ -S "/tmp/$name/relevo.sock" ] && break; sleep 0.1; done
    done
    "$relevo" --state-dir /tmp/one init --name bench --sensitivity patient --node one --path lan=127.0.1.1 || return
    token=$("$relevo" --state-dir /tmp/one token --json | grep -o '"token": *"[^"]*"' | cut -d'"' -f4)
    "$relevo" --state-dir /tmp/two join "$token" --node two --path lan=127.0.1.2 || return
    for _ in $(seq 30); do
        "$relevo" --state-dir /tmp/one volume create v --size 240MiB --force \
            --on one=/dev/ram2 --on two=/dev/ram3 && break
        sleep 1
    done
    "$relevo" --state-dir /tmp/one primary v && "$relevo" --state-dir /tmp/one wait-sync v
}

ticks() { awk '{ print $14 + $15 }' "/proc/$1/stat"; } # of a process, in hundredths of a second
busy() { awk '/^cpu / { print $2, $4 + $7 + $8 }' /proc/stat; } # programs, kernel

measure() { # measure NAME DEPTH FIO-ARGUMENTS...
    local name=$1 depth=$2 before after result
    shift 2
    # Idle daemons take a part of a translated processor: they hold still while it is another's turn. Not as long
    # as it takes to be taken for dead.
    case $name in Relevo*) ;; *) kill -STOP "$pid_one" "$pid_two" ;; esac
    before="$(busy) $(ticks "$pid_one") $(ticks "$pid_two")"
    result=$(fio --name=write "$@" --direct=1 --rw=randwrite --bs=4k --iodepth="$depth" --size=200m --time_based \
        --runtime="$seconds" --output-format=terse --terse-version=3 2>>/tmp/log)
    after="$(busy) $(ticks "$pid_one") $(ticks "$pid_two")"
    kill -CONT "$pid_one" "$pid_two"
    sleep 1
    echo "$result;$before $after" | awk -F';' -v name="$name" -v depth="$depth" -v seconds="$seconds" '$49 > 0 {
        split($NF, t, " "); writes = $49 * seconds
        printf "CELL\t%s\t%s\t%.0f\t%.0f\t%.0f\t%.0f\t%.0f\t%.0f\n", name, depth, $49, $81,
            (t[5] - t[1]) * 1e4 / writes, (t[6] - t[2]) * 1e4 / writes, (t[7] - t[3]) * 1e4 / writes,
            (t[8] - t[4]) * 1e4 / writes }'
}

inside() {
    drbdsetup=$(command -v drbdsetup-84 || echo /usr/lib/drbd/drbdsetup-84)
    drbd_up
    relevo_up >>/tmp/log 2>&1 || { cat /tmp/log; die "Relevo does not come up"; }
    head -1 /proc/drbd
    local depth device=
    [ -b "$(realpath /tmp/one/dev/v 2>/dev/null)" ] && device=/tmp/one/dev/v
    for _ in $(seq "$rounds"); do
        for depth in 1 16; do
            measure "RAM disk" "$depth" --ioengine=libaio --filename=/dev/ram4
            measure "DRBD 8.4" "$depth" --ioengine=libaio --filename=/dev/drbd0
            measure "Relevo, NBD" "$depth" --ioengine=nbd --uri="nbd+unix:///v?socket=/tmp/one/nbd/v.sock"
            [ -z "$device" ] || measure "Relevo, block device" "$depth" --ioengine=libaio --filename="$device"
        done
    done
    cmp -n 209715200 /dev/ram0 /dev/ram1 && cmp -n 209715200 /dev/ram2 /dev/ram3 &&
        echo "the replicas of both are identical"
}

if [ "${1:-}" = --inside ]; then inside; exit; fi

# ---- on the host -----------------------------------------------------------------------------------------------

for tool in qemu-system-x86_64:qemu-system-x86 drbdmeta:drbd-utils cpio:cpio modprobe:kmod xz:xz-utils fio:fio; do
    command -v "${tool%%:*}" >/dev/null || die "${tool%%:*} is not here (Debian: apt-get install ${tool#*:})"
done
relevo=$(realpath "$relevo") && [ -x "$relevo" ] || die "the program is not here: cargo build --release, or set RELEVO"
work=$(mktemp -d "${TMPDIR:-/tmp}/relevo-bench-XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
cd "$work" || exit 1

kernel=${KERNEL:-$(apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }')}
[ -n "$kernel" ] || die "no kernel image is known to apt-get; apt-get update, or set KERNEL"
say "downloading $kernel and busybox-static ..."
apt-get download "$kernel" busybox-static >log 2>&1 || die "$(cat log)"
for package in *.deb; do dpkg -x "$package" root; done
version=$(ls root/lib/modules)
depmod -b root "$version"

mkdir -p boot/{bin,proc,sys,dev,host,own,new,modules}
cp root/bin/busybox boot/bin/ 2>/dev/null || cp root/usr/bin/busybox boot/bin/
# Every module that is wanted with those that it needs, in the order of loading.
for wanted in virtio_pci 9pnet_virtio 9p overlay "brd rd_nr=5 rd_size=262144" drbd fuse loop; do
    modprobe -d root -S "$version" --show-depends "${wanted%% *}" 2>/dev/null | while read -r kind file _; do
        [ "$kind" = insmod ] || continue
        name=$(basename "$file" .xz)
        [ ! -e "boot/modules/$name" ] || continue
        case $file in *.xz) xz -dc "$file" >"boot/modules/$name" ;; *) cp "$file" "boot/modules/$name" ;; esac
        parameters=
        [ "$name" != "${wanted%% *}.ko" ] || [ "$wanted" = "${wanted%% *}" ] || parameters=${wanted#* }
        echo "$name $parameters" >>boot/modules/order
    done
done
cp "$self" boot/script
cat >boot/init <<INIT
#!/bin/busybox sh
b=/bin/busybox
\$b mount -t proc p /proc; \$b mount -t sysfs s /sys; \$b mount -t devtmpfs d /dev
while read -r module; do \$b insmod /modules/\$module; done </modules/order
\$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro,cache=loose host /host
\$b mount -t tmpfs t /own; \$b mkdir /own/upper /own/work
\$b mount -t overlay -o lowerdir=/host,upperdir=/own/upper,workdir=/own/work o /new
\$b mount -t proc p /new/proc; \$b mount -t sysfs s /new/sys; \$b mount -t devtmpfs d /new/dev
\$b mount -t tmpfs t /new/run; \$b mount -t tmpfs t /new/tmp
\$b cp /script /new/run/script; \$b cp /host$relevo /new/run/relevo
\$b ip link set lo up
\$b chroot /new /bin/bash -c 'export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RELEVO=/run/relevo; mkdir -p /dev/shm /run/lock; mount -t tmpfs s /dev/shm; ROUNDS=$rounds SECONDS_EACH=$seconds bash /run/script --inside; echo "END \$?"'
\$b poweroff -f
INIT
chmod +x boot/init
(cd boot && find . | cpio -o -H newc --quiet | gzip -1) >initrd

# One processor: more of them are no faster when they are translated.
accel=${ACCEL:-tcg}
cpu=max
# Where KVM is offered and does not work, a kernel without a root file system does not get as far as its end.
{
    if [ -z "${ACCEL:-}" ] && timeout 20 qemu-system-x86_64 -accel kvm -cpu host -m 256 -display none -nodefaults \
        -no-reboot -kernel "root/boot/vmlinuz-$version" -append "panic=-1 quiet" >log 2>&1; then
        accel=kvm
        cpu=host
    fi
} 2>/dev/null
say "the guest runs with $accel ..."
timeout 900 qemu-system-x86_64 -accel "$accel" -cpu "$cpu" -m "${MEMORY:-3G}" -nographic -nodefaults -no-reboot \
    -serial stdio -kernel "root/boot/vmlinuz-$version" -initrd initrd \
    -append "console=ttyS0 quiet loglevel=3 panic=1 mitigations=off" \
    -fsdev local,id=h,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=h,mount_tag=host </dev/null | tr -d '\r' | sed 's/\x1b[^a-zA-Z]*[a-zA-Z]//g; s/^c*\(version\|CELL\)/\1/' >out
grep -v '^CELL\|SeaBIOS\|^Booting\|^$' out >&2
grep -q '^END 0' out || die "the guest failed"
echo "guest: $version, $accel, one processor; RAM disks; protocol C"
grep '^CELL' out | cut -f2- | sort -t "$(printf '\t')" -k2,2n -k1,1 -k3,3n | awk -F'\t' '
    { cell = $2 FS $1; if (!(cell in count)) order[++cells] = cell; line[cell, ++count[cell]] = $0 }
    END {
        printf "%-6s %-22s %9s %9s %10s   %s\n", "depth", "", "writes/s", "mean us", "of DRBD",
            "processor for a write, us: programs, kernel; of it Relevo one, two"
        for (pass = 1; pass <= 2; pass++) for (i = 1; i <= cells; i++) {
            split(line[order[i], int((count[order[i]] + 1) / 2)], f, FS)
            if (pass == 1) { if (f[1] == "DRBD 8.4") drbd[f[2]] = f[3]; continue }
            printf "%-6s %-22s %9d %9d %9.0f %%   %d, %d; %d, %d\n", f[2], f[1], f[3], f[4], 100 * f[3] / drbd[f[2]],
                f[5], f[6], f[7], f[8]
        }
    }'
