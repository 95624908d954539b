//! Resyncs of real daemons: what travels, what it takes on disk, and what is told of it.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    time::Duration,
};

use relevo_export::nbd::{Client, NbdAddr};
use serde_json::Value;

use crate::daemons::{Daemon, Site, eventually};

/// A resync of these volumes takes a second or two; test machines are busy.
const BOUND: Duration = Duration::from_secs(40);

const MIB: u64 = 1 << 20;

/// The volume as its primary serves it.
fn client(primary: &Daemon) -> Client {
    let address = NbdAddr::Unix(primary.nbd_socket("mail"));
    Client::connect(&address, "mail", Some(BOUND)).unwrap()
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

/// What the primary says of beta's replica.
fn beta(alfa: &Daemon) -> Value {
    let volume = alfa.find("volumes", "mail");
    let replicas = volume["replicas"].as_array().unwrap();
    let beta = replicas.iter().find(|replica| replica["node"] == "beta");
    beta.cloned().unwrap_or(Value::Null)
}

fn is_whole(alfa: &Daemon) -> bool {
    alfa.find("volumes", "mail")["in_sync"] == serde_json::json!(["alfa", "beta"])
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
    let mut disk = client(&alfa);
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
    eventually(BOUND, "both replicas are in sync", || is_whole(&alfa));
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
    let mut disk = client(&alfa);
    write(&mut disk, 0, 32 * MIB);
    disk.flush().unwrap();
    beta.ok(&["invalidate", "mail"]);
    eventually(BOUND, "beta left the set, and is in it again", || {
        is_whole(&alfa) && self::beta(&alfa)["sync_same_bytes"] == 32 * MIB
    });
    alfa.ok(&["volume", "set", "mail", "csums=no"]);
    beta.ok(&["invalidate", "mail"]);
    eventually(BOUND, "the same without a comparison", || {
        is_whole(&alfa) && self::beta(&alfa)["sync_same_bytes"].is_null()
    });
    assert_equal(&alfa, &beta, 32);
}
