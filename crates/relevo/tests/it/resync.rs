//! Resyncs of real daemons: what travels, what it takes on disk, and what is told of it.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    time::{Duration, SystemTime},
};

use relevo_export::nbd::{Client, NbdAddr};
use serde_json::Value;

use crate::daemons::{Daemon, Site, eventually};

/// A resync of these volumes takes a second or two; test machines are busy.
const BOUND: Duration = Duration::from_secs(40);

const MIB: u64 = 1 << 20;

/// A volume as its primary serves it.
fn client(primary: &Daemon, volume: &str) -> Client {
    let address = NbdAddr::Unix(primary.nbd_socket(volume));
    Client::connect(&address, volume, Some(BOUND)).unwrap()
}

/// A node's one backing file.
fn backing(node: &Daemon) -> File {
    let pool = node.state_dir().join("pool");
    let mut files = std::fs::read_dir(pool).unwrap();
    File::open(files.next().unwrap().unwrap().path()).unwrap()
}

/// What it takes on its disk, in bytes.
fn stored(node: &Daemon) -> u64 {
    backing(node).metadata().unwrap().blocks() * 512
}

/// The replicas of two nodes have the same so many MiB.
fn assert_equal(one: &Daemon, other: &Daemon, mib: u64) {
    let files = [backing(one), backing(other)];
    for at in (0..mib).map(|number| number * MIB) {
        let parts = files.each_ref().map(|file| {
            let mut part = vec![0; 1 << 20];
            file.read_exact_at(&mut part, at).unwrap();
            part
        });
        assert!(parts[0] == parts[1], "they differ in the MiB from {at} on");
    }
}

/// What the primary says of beta's replica of a volume.
fn beta(alfa: &Daemon, volume: &str) -> Value {
    let volume = alfa.find("volumes", volume);
    let replicas = volume["replicas"].as_array().unwrap();
    let beta = replicas.iter().find(|replica| replica["node"] == "beta");
    beta.cloned().unwrap_or(Value::Null)
}

fn is_whole(alfa: &Daemon, volume: &str) -> bool {
    alfa.find("volumes", volume)["in_sync"] == serde_json::json!(["alfa", "beta"])
}

fn write(client: &mut Client, from: u64, len: u64) {
    let data: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8 | 1).collect();
    for offset in (from..from + len).step_by(usize::try_from(MIB).unwrap()) {
        client.write(offset, &data, false).unwrap();
    }
}

/// Data in two places, a discarded middle, and blocks here and there: a new replica of it takes no more
/// room than the old one.
#[test]
fn a_resync_of_a_sparse_volume_stays_sparse() {
    let site = Site::new();
    let [alfa, beta, _wit] = site.cluster();
    alfa.ok(&["volume", "create", "mail", "--size", "256MiB"]);
    alfa.ok(&["primary", "mail"]);
    let mut disk = client(&alfa, "mail");
    write(&mut disk, 0, 24 * MIB);
    write(&mut disk, 248 * MIB, 8 * MIB);
    disk.trim(4 * MIB, 16 << 20).unwrap();
    for block in 0..64 {
        disk.write(64 * MIB + block * 64 * 1024, &[7; 4096], false)
            .unwrap();
    }
    disk.flush().unwrap();
    let before = stored(&alfa);
    assert!(before < 24 * MIB, "the discard released nothing: {before}");

    alfa.ok(&["volume", "replica", "remove", "mail", "beta"]);
    alfa.ok(&["volume", "replica", "add", "mail", "beta"]);
    eventually(BOUND, "both replicas are in sync", || {
        is_whole(&alfa, "mail")
    });
    let (source, target) = (stored(&alfa), stored(&beta));
    said::say(format_args!(
        "sparse resync: {source} bytes on the source's disk, {target} on the target's"
    ));
    // The file system gives room in pieces, and the metadata has its own.
    assert!(target <= source + MIB, "{target} of {source}");

    disk.disconnect().unwrap();
    assert_equal(&alfa, &beta, 256);
}

/// A replica that counts as doubtful and is the same costs digests, and `status` says so.
#[test]
fn an_invalidated_replica_that_is_the_same_is_only_compared() {
    let site = Site::new();
    let [alfa, beta, _wit] = site.cluster();
    alfa.ok(&["volume", "create", "mail", "--size", "32MiB"]);
    alfa.ok(&["primary", "mail"]);
    let mut disk = client(&alfa, "mail");
    write(&mut disk, 0, 32 * MIB);
    disk.flush().unwrap();
    beta.ok(&["invalidate", "mail"]);
    eventually(BOUND, "beta left the set, and is in it again", || {
        is_whole(&alfa, "mail") && self::beta(&alfa, "mail")["sync_same_bytes"] == 32 * MIB
    });
    alfa.ok(&["volume", "set", "mail", "csums=no"]);
    beta.ok(&["invalidate", "mail"]);
    eventually(BOUND, "the same without a comparison", || {
        is_whole(&alfa, "mail") && self::beta(&alfa, "mail")["sync_same_bytes"].is_null()
    });
    assert_equal(&alfa, &beta, 32);
}

/// What writes of 4 KiB took, one after the other, until `over`: the median and the 95th percentile.
fn latencies(disk: &mut Client, mut over: impl FnMut(Duration) -> bool) -> [Duration; 2] {
    let start = SystemTime::now();
    let mut took = Vec::new();
    let mut place = 7;
    // Asking whether it is over is no write.
    while took.len() % 50 != 0 || !over(start.elapsed().unwrap_or_default()) {
        place = place * 1_103_515_245_u64 % 16_384;
        let before = SystemTime::now();
        disk.write(place * 4096, &[9; 4096], false).unwrap();
        took.push(before.elapsed().unwrap_or_default());
    }
    took.sort();
    [took[took.len() / 2], took[took.len() * 95 / 100]]
}

/// Lets beta be copied anew and gives the time from the begin of the resync to its end.
fn resync_time(alfa: &Daemon, beta: &Daemon) -> Duration {
    beta.ok(&["invalidate", "mail"]);
    eventually(BOUND, "the resync began", || !is_whole(alfa, "mail"));
    let start = SystemTime::now();
    eventually(BOUND, "both replicas are in sync", || {
        is_whole(alfa, "mail")
    });
    start.elapsed().unwrap_or_default()
}

/// Alone a resync is as fast as it can be; beside an application that writes it is held to what the
/// application leaves.
#[test]
fn a_resync_leaves_the_application_its_time() {
    let site = Site::new();
    let [alfa, beta, _wit] = site.cluster();
    alfa.ok(&["volume", "create", "mail", "--size", "192MiB"]);
    alfa.ok(&["volume", "set", "mail", "csums=no"]);
    alfa.ok(&["primary", "mail"]);
    let mut disk = client(&alfa, "mail");
    write(&mut disk, 0, 192 * MIB);
    disk.flush().unwrap();

    let alone = resync_time(&alfa, &beta);
    let before = latencies(&mut disk, |time| time > Duration::from_secs(2));
    let during = |disk: &mut Client| {
        beta.ok(&["invalidate", "mail"]);
        let mut began = false;
        latencies(disk, |time| {
            let whole = is_whole(&alfa, "mail");
            began |= !whole;
            time > BOUND || began && whole
        })
    };
    let held = during(&mut disk);
    // Held by nothing: the least is more than any disk can do.
    alfa.ok(&["volume", "set", "mail", "c-min-rate=1T"]);
    let unheld = during(&mut disk);
    said::say(format_args!(
        "resync of 192 MiB alone: {alone:?}; writes of 4 KiB, median and 95th percentile: {before:?} \
         without a resync, {held:?} beside one, {unheld:?} beside one that is not held"
    ));
    assert!(
        held[0] <= before[0] * 5 + Duration::from_millis(10),
        "{held:?} after {before:?}"
    );

    // One speed, whatever happens.
    alfa.ok(&["volume", "set", "mail", "resync-rate=48M"]);
    let fixed = resync_time(&alfa, &beta);
    assert!(fixed >= Duration::from_secs(3), "192 MiB took {fixed:?}");
    assert!(fixed >= alone / 2, "{fixed:?} and {alone:?}");
}

#[test]
fn a_volume_is_resynced_after_another_one() {
    let site = Site::new();
    let [alfa, beta, _wit] = site.cluster();
    for (volume, size) in [("mail", 48), ("post", 16)] {
        alfa.ok(&["volume", "create", volume, "--size", &format!("{size}MiB")]);
        alfa.ok(&["volume", "set", volume, "csums=no"]);
        alfa.ok(&["primary", volume]);
        let mut disk = client(&alfa, volume);
        write(&mut disk, 0, size * MIB);
        disk.disconnect().unwrap();
    }
    let unknown = alfa.refused(&["volume", "set", "post", "resync-after=past"]);
    assert!(unknown.contains("another volume"), "{unknown}");
    alfa.ok(&["volume", "set", "post", "resync-after=mail"]);
    let circle = alfa.refused(&["volume", "set", "mail", "resync-after=post"]);
    assert!(circle.contains("wait for each other"), "{circle}");

    // Six seconds.
    alfa.ok(&["volume", "set", "mail", "resync-rate=8M"]);
    beta.ok(&["invalidate", "mail"]);
    eventually(BOUND, "mail is resynced", || {
        self::beta(&alfa, "mail")["replication"] == "SyncSource"
    });
    beta.ok(&["invalidate", "post"]);
    eventually(BOUND, "post waits, and says for what", || {
        let post = self::beta(&alfa, "post");
        post["replication"] == "PausedSyncS" && post["sync_after"] == "mail"
    });
    let status = alfa.run(&["status"]).out;
    assert!(status.contains("(after volume mail)"), "{status}");
    eventually(BOUND, "mail is in sync", || {
        let post = is_whole(&alfa, "post");
        let mail = is_whole(&alfa, "mail");
        assert!(mail || !post, "post was first");
        mail
    });
    eventually(BOUND, "post is in sync", || is_whole(&alfa, "post"));
    // Who waits for a volume that is removed waits for none.
    beta.ok(&["invalidate", "mail"]);
    eventually(BOUND, "mail is in sync again", || is_whole(&alfa, "mail"));
    alfa.ok(&["secondary", "mail"]);
    alfa.ok(&["volume", "remove", "mail"]);
    let options = alfa.ok(&["volume", "options", "post"]);
    assert!(options.contains("resync-after"), "{options}");
    assert!(!options.contains("mail"), "{options}");
}

#[test]
fn so_many_volumes_are_resynced_at_a_time() {
    let site = Site::new();
    let [alfa, mut beta, _wit] = site.cluster();
    let volumes = ["mail", "post", "web"];
    for volume in volumes {
        alfa.ok(&["volume", "create", volume, "--size", "12MiB"]);
        alfa.ok(&["volume", "set", volume, "csums=no", "resync-rate=8M"]);
        alfa.ok(&["primary", volume]);
        let mut disk = client(&alfa, volume);
        write(&mut disk, 0, 12 * MIB);
        disk.disconnect().unwrap();
    }
    beta.kill();
    beta.start_with(&["--max-resyncs", "1"]);
    eventually(BOUND, "all are in sync", || {
        volumes.iter().all(|it| is_whole(&alfa, it))
    });
    for volume in volumes {
        beta.ok(&["invalidate", volume]);
    }
    let mut waited = false;
    eventually(BOUND, "all are in sync again", || {
        let states = volumes.map(|volume| self::beta(&alfa, volume));
        let copies = |it: &&Value| it["replication"] == "SyncSource";
        waited |= states.iter().any(|it| it["sync_after"].is_string());
        assert!(
            !waited || states.iter().filter(copies).count() <= 2,
            "{states:?}"
        );
        volumes.iter().all(|it| is_whole(&alfa, it))
    });
    assert!(waited, "none waited for its turn");
}
