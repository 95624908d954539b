//! What only the loser of a split brain has is in a file before it is overwritten.

use std::{fs, path::PathBuf, process::Command};

use relevo_datapath::DatapathEvent;
use relevo_disk::probe;
use relevo_format::saved::Reader;
use relevo_replication::{Order, PeerState, VolumeEvent};
use relevo_types::{LineageId, cluster::VolumeChange};

use crate::{
    cluster::{A, B, Cluster},
    replication::beside,
};

const BLOCK: usize = 4096;

/// The first of the blocks that both write.
const SHARED: u64 = 5;

/// A wrote 300 blocks alone, more than one part of what is saved; B, forced in its place, others and some
/// of the same. A is back and they met.
fn forked() -> Cluster {
    let mut cluster = Cluster::new(&[A, B]);
    cluster.promote(A);
    let mut client = cluster.connect(A);
    client = beside(&mut cluster, move || {
        client.write(0, &vec![1; BLOCK], true).unwrap();
        client
    });
    cluster.cut();
    beside(&mut cluster, move || {
        for n in 0..300_u64 {
            let fill = vec![(n % 250) as u8 + 2; BLOCK];
            client
                .write((SHARED + n) * BLOCK as u64, &fill, false)
                .unwrap();
        }
        client.flush().unwrap();
    });
    assert_eq!(cluster.in_sync(), [A]);
    assert!(cluster.handle(A).stop());
    cluster.nodes.remove(&A);

    let change = |cluster: &mut Cluster, change| {
        let epoch = cluster.volume().epoch;
        cluster.commit(epoch, change);
    };
    change(&mut cluster, VolumeChange::Demote { node: A });
    let force = VolumeChange::Force {
        node: B,
        lineage: LineageId(0xbeef),
        others_give_way: false,
    };
    change(&mut cluster, force);
    cluster.promote(B);
    let mut client = cluster.connect(B);
    beside(&mut cluster, move || {
        client
            .write(SHARED * BLOCK as u64, &vec![0xbb; 2 * BLOCK], true)
            .unwrap();
    });
    cluster.start(A, &probe());
    cluster.cut = false;
    cluster.until("they met", |c| {
        [A, B]
            .iter()
            .all(|node| !c.handle(*node).status().engine.splits.is_empty())
    });
    cluster
}

fn keep_in_force(cluster: &mut Cluster) {
    let epoch = cluster.volume().epoch;
    cluster.commit(epoch, VolumeChange::KeepInForce);
}

/// Names of the files in a node's directory.
fn files(cluster: &Cluster) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cluster.saved_dir(A)) else {
        return Vec::new();
    };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The file has what was A's; the replicas are B's.
fn expect_saved(cluster: &mut Cluster, lost: &[u8]) {
    cluster.until("A is in sync", |c| c.in_sync() == [A, B]);
    assert!(cluster.data(A) == cluster.data(B), "the replicas are equal");
    let kept = cluster.data(A);
    assert_eq!(kept[SHARED as usize * BLOCK], 0xbb);
    let files = files(cluster);
    assert_eq!(files.len(), 1, "{files:?}");
    let name = files[0].file_name().unwrap().to_str().unwrap();
    assert!(
        name.starts_with("mail-2") && name.ends_with("Z-0000000000000009.saved"),
        "{name}"
    );
    let mut reader = Reader::open(fs::File::open(&files[0]).unwrap()).unwrap();
    let header = reader.header().clone();
    assert_eq!((header.node, header.to), (A, B));
    assert_eq!(header.lineage, LineageId(9));
    assert_eq!(header.size, lost.len() as u64);
    let mut restored = kept;
    while let Some(record) = reader.next_record().unwrap() {
        let at = record.blocks.bytes().offset as usize;
        restored[at..at + record.data.len()].copy_from_slice(&record.data);
    }
    let own = SHARED as usize * BLOCK..(SHARED as usize + 300) * BLOCK;
    assert!(restored[own.clone()] == lost[own], "what A had is there");
    assert!(cluster.said(A, |event| matches!(
        event,
        DatapathEvent::Saved { path } if *path == files[0]
    )));
    assert!(cluster.said(A, |event| matches!(
        event,
        DatapathEvent::Volume(VolumeEvent::GaveWay { to: B, saved }) if *saved == header.blocks
    )));
}

#[test]
fn what_gives_way_is_in_a_file_first() {
    let mut cluster = forked();
    let lost = cluster.data(A);
    assert!(files(&cluster).is_empty(), "nobody decided yet");
    // What a process that died left behind goes; another volume's does not.
    let dir = cluster.saved_dir(A);
    fs::create_dir(&dir).unwrap();
    let stale = dir.join("mail-20200101T000000Z-0000000000000009.saved.part");
    fs::write(&stale, "half").unwrap();
    keep_in_force(&mut cluster);
    expect_saved(&mut cluster, &lost);
}

/// Nothing is overwritten where nothing can be saved; both sides stand alone until it can.
fn without_a_place(mut cluster: Cluster, words: &str, mend: impl FnOnce()) {
    let lost = cluster.data(A);
    keep_in_force(&mut cluster);
    cluster.until("A stands alone", |c| {
        c.handle(A).status().engine.peers.get(&B) == Some(&PeerState::StandAlone)
    });
    assert!(cluster.data(A) == lost, "nothing was overwritten");
    cluster.until("it says why", |c| {
        c.said(A, |event| match event {
            DatapathEvent::LinkLost { reason, .. } => reason.contains(words),
            _ => false,
        })
    });
    let incomplete = |c: &Cluster| files(c).iter().any(|it| it.extension().unwrap() == "part");
    cluster.until("nothing is left of the attempt", |c| !incomplete(c));
    mend();
    let connect = Order::Connect { peer: None };
    let done = Box::new(|result: Result<(), String>| result.unwrap());
    cluster.handle(A).order(connect, done).unwrap();
    expect_saved(&mut cluster, &lost);
}

#[test]
fn without_a_directory_nothing_is_overwritten() {
    let cluster = forked();
    let dir = cluster.saved_dir(A);
    fs::write(&dir, "in the way").unwrap();
    without_a_place(cluster, "can't be made", || fs::remove_file(dir).unwrap());
}

#[test]
fn on_a_full_disk_nothing_is_overwritten() {
    let name = "on_a_full_disk_nothing_is_overwritten";
    let cluster = forked();
    let dir = cluster.saved_dir(A);
    fs::create_dir(&dir).unwrap();
    let at = dir.to_str().unwrap().to_owned();
    let mount = |options: &str| {
        let args = ["-t", "tmpfs", "-o", options, "none", &at];
        let done = Command::new("mount").args(args).output();
        done.is_ok_and(|done| done.status.success())
    };
    if !mount("size=256k") {
        return said::skip(name, "no tmpfs can be mounted");
    }
    let _mounted = Mounted(at.clone());
    without_a_place(cluster, "No space left", || {
        assert!(mount("remount,size=64m"));
    });
}

struct Mounted(String);

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").args(["-l", &self.0]).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}
