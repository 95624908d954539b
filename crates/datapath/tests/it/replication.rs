//! What a user relies on, end to end through one process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use relevo_datapath::DatapathEvent;
use relevo_disk::{DriverChoice, DriverKind};
use relevo_export::nbd::Client;
use relevo_replication::VolumeEvent;
use relevo_types::cluster::Encryption;

use crate::cluster::{A, B, Cluster, SIZE};

fn block(fill: u8, len: usize) -> Vec<u8> {
    vec![fill; len]
}

fn read(client: &mut Client, offset: u64, len: usize) -> Vec<u8> {
    let mut data = block(0, len);
    client.read(offset, &mut data).unwrap();
    data
}

/// Runs a client on a thread of its own while the cluster goes on.
pub(crate) fn beside<T: Send + 'static>(
    cluster: &mut Cluster,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let worker = thread::spawn(work);
    cluster.until("a client is served", |_| worker.is_finished());
    worker.join().unwrap()
}

fn written_and_equal(driver: &DriverChoice) {
    let mut cluster = Cluster::with_driver(&[A, B], driver);
    cluster.promote(A);
    let status = cluster.handle(A).status();
    assert_eq!(status.driver.kind, driver.kind);
    let mut client = cluster.connect(A);
    assert_eq!(client.size(), SIZE);
    let mut expected = block(0, SIZE as usize);
    let mut put = |offset: usize, data: &[u8]| {
        expected[offset..offset + data.len()].copy_from_slice(data);
        (offset as u64, data.to_vec())
    };
    let writes = [
        put(0, &block(1, 4096)),
        put(1 << 20, &block(2, 3 << 20)),
        put(8 << 20, &block(3, 4096)),
        put((8 << 20) + 100, &block(4, 512)),
        put((9 << 20) - 1, &block(5, 100_001)),
    ];
    client = beside(&mut cluster, move || {
        for (offset, data) in writes {
            client.write(offset, &data, false).unwrap();
        }
        client.flush().unwrap();
        client
    });
    for node in [A, B] {
        assert!(cluster.data(node) == expected, "{node} differs");
    }
    client = beside(&mut cluster, move || {
        client.trim(1 << 20, 1 << 20).unwrap();
        client.write_zeroes((2 << 20) + 5, 10_000, true).unwrap();
        assert!(read(&mut client, 1 << 20, 1 << 20).iter().all(|b| *b == 0));
        assert_eq!(read(&mut client, (8 << 20) + 99, 3), [3, 4, 4]);
        client
    });
    expected[1 << 20..2 << 20].fill(0);
    expected[(2 << 20) + 5..(2 << 20) + 10_005].fill(0);
    let client = beside(&mut cluster, move || {
        client.flush().unwrap();
        client
    });
    for node in [A, B] {
        assert!(
            cluster.data(node) == expected,
            "{node} differs after zeroing"
        );
    }
    drop(client);
}

#[test]
fn a_write_is_on_both_disks_when_it_is_answered() {
    written_and_equal(&relevo_disk::probe());
}

#[test]
fn the_thread_pool_does_the_same() {
    written_and_equal(&DriverChoice {
        kind: DriverKind::Pool,
        reason: "test".to_owned(),
    });
}

#[test]
fn a_lost_peer_leaves_and_comes_back_equal() {
    let mut cluster = Cluster::new(&[A, B]);
    cluster.promote(A);
    let mut client = cluster.connect(A);
    client = beside(&mut cluster, move || {
        client.write(0, &block(1, 1 << 20), true).unwrap();
        client
    });
    cluster.cut();
    // Goes on once the peer has left the in-sync set.
    client = beside(&mut cluster, move || {
        for n in 0..50_u64 {
            client
                .write(n * 300 * 4096, &block(n as u8, 8192), false)
                .unwrap();
        }
        client.flush().unwrap();
        client
    });
    assert_eq!(cluster.in_sync(), [A]);
    assert!(cluster.said(A, |event| matches!(
        event,
        DatapathEvent::LinkLost { peer: B, .. }
    )));
    assert!(cluster.data(A) != cluster.data(B));
    cluster.cut = false;
    // Writes go on while the peer catches up.
    let mut client = beside(&mut cluster, move || {
        for n in 0..50_u64 {
            client
                .write(n * 301 * 4096, &block(99, 4096), false)
                .unwrap();
        }
        client
    });
    cluster.until("the peer is in sync again", |c| c.in_sync() == [A, B]);
    let client = beside(&mut cluster, move || {
        client.flush().unwrap();
        client
    });
    assert!(cluster.data(A) == cluster.data(B), "the replicas are equal");
    drop(client);
}

/// Both ends of a link end it as soon as the configuration says otherwise; the next one is as it says.
#[test]
fn encryption_changes_while_the_volume_is_in_use() {
    let mut cluster = Cluster::new(&[A, B]);
    cluster.promote(A);
    let mut client = cluster.connect(A);
    assert_eq!(cluster.made, Some(Encryption::On));
    for (round, encryption) in [(1, Encryption::Off), (2, Encryption::On)] {
        cluster.set_encryption(encryption);
        client = beside(&mut cluster, move || {
            for n in 0..100_u64 {
                let len = if n % 10 == 0 { 1 << 20 } else { 8192 };
                let data = block(round * 100 + n as u8 % 50, len);
                client.write(n * 100 * 4096, &data, false).unwrap();
            }
            client.flush().unwrap();
            client
        });
        cluster.until("a link as wanted, and in sync", |c| {
            c.made == Some(encryption) && c.in_sync() == [A, B]
        });
        client = beside(&mut cluster, move || {
            client.write(0, &block(round, 3 << 20), true).unwrap();
            client
        });
        assert!(cluster.data(A) == cluster.data(B), "the replicas are equal");
    }
    drop(client);
}

#[test]
fn a_switchover_takes_the_data_along() {
    let mut cluster = Cluster::new(&[A, B]);
    let refused = Client::connect(&cluster.nodes[&B].nbd, "mail", None).unwrap_err();
    assert!(refused.to_string().contains("not open"), "{refused}");
    cluster.promote(A);
    let tcp = cluster.listen_tcp(A);
    let mut client = beside(&mut cluster, move || {
        let mut client = Client::connect(&tcp, "mail", None).unwrap();
        client.write(4096, &block(7, 4096), false).unwrap();
        client
    });
    cluster.handle(A).demote().unwrap();
    cluster.until("the primary stepped down", |c| c.volume().primary.is_none());
    cluster.until("it said so", |c| {
        c.said(A, |event| {
            matches!(event, DatapathEvent::Volume(VolumeEvent::Closed { .. }))
        })
    });
    let ended = beside(&mut cluster, move || {
        client.write(0, &block(8, 4096), false)
    });
    assert!(ended.is_err(), "the old session is over");
    cluster.promote(B);
    let mut client = cluster.connect(B);
    let data = beside(&mut cluster, move || read(&mut client, 4096, 4096));
    assert_eq!(data, block(7, 4096));
    let refused = Client::connect(&cluster.nodes[&A].nbd, "mail", None).unwrap_err();
    assert!(!refused.to_string().is_empty());
}

#[test]
fn unaligned_writes_of_two_clients_lose_nothing() {
    let mut cluster = Cluster::new(&[A, B]);
    cluster.promote(A);
    let mut clients = [cluster.connect(A), cluster.connect(A)];
    let mut check = cluster.connect(A);
    // Both write every other 512 bytes of the same blocks.
    let workers: Vec<_> = clients
        .iter_mut()
        .enumerate()
        .map(|(which, client)| {
            // Each client moves to its thread.
            let mut client = std::mem::replace(client, cluster.connect(A));
            thread::spawn(move || {
                for sector in (which as u64..256).step_by(2) {
                    let fill = 10 + which as u8;
                    client
                        .write(sector * 512, &block(fill, 512), false)
                        .unwrap();
                }
            })
        })
        .collect();
    cluster.until("both clients are done", |_| {
        workers.iter().all(|w| w.is_finished())
    });
    for worker in workers {
        worker.join().unwrap();
    }
    let data = beside(&mut cluster, move || read(&mut check, 0, 256 * 512));
    for (sector, bytes) in data.chunks(512).enumerate() {
        assert_eq!(
            bytes,
            block(10 + (sector % 2) as u8, 512),
            "sector {sector}"
        );
    }
}

#[test]
fn a_restarted_secondary_catches_up() {
    let mut cluster = Cluster::new(&[A, B]);
    cluster.promote(A);
    assert!(cluster.handle(B).stop());
    assert!(!cluster.handle(B).status().alive);
    cluster.cut();
    let mut client = cluster.connect(A);
    // `stop` is a crash: the node's commands fail from now on, so it leaves the test's cluster.
    let stopped = cluster.nodes.remove(&B).unwrap();
    drop(stopped);
    client = beside(&mut cluster, move || {
        client.write(1 << 20, &block(6, 1 << 20), true).unwrap();
        client
    });
    assert_eq!(cluster.in_sync(), [A]);
    cluster.start(B, &relevo_disk::probe());
    cluster.cut = false;
    cluster.until("the peer is in sync again", |c| c.in_sync() == [A, B]);
    assert!(cluster.data(A) == cluster.data(B), "the replicas are equal");
    drop(client);
}

/// The link moves to another connection again and again while a client writes, as it does when it goes back
/// to the path that it prefers: nothing is lost, and nobody leaves the in-sync set.
#[test]
fn a_link_moves_to_another_connection_and_nobody_notices() {
    let mut cluster = Cluster::new(&[A, B]);
    cluster.promote(A);
    cluster.until("both are in sync", |c| c.in_sync() == [A, B]);
    let epoch = cluster.volume().epoch;
    let mut client = cluster.connect(A);
    let (stop, writes) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let (told, count) = (Arc::clone(&stop), Arc::clone(&writes));
    let writer = thread::spawn(move || {
        while !told.load(Ordering::Relaxed) {
            let n = count.fetch_add(1, Ordering::Relaxed);
            let len = [4096, 1 << 20, 65_536][n as usize % 3];
            let data = block(n as u8, len);
            client.write(n % 50 * (1 << 20), &data, false).unwrap();
        }
        client.flush().unwrap();
    });
    for round in 0..30 {
        cluster.move_link(if round % 2 == 0 { A } else { B });
        let before = writes.load(Ordering::Relaxed);
        cluster.until("writes go on", |_| {
            writes.load(Ordering::Relaxed) > before + 10
        });
    }
    let lost = |event: &DatapathEvent| matches!(event, DatapathEvent::LinkLost { .. });
    assert!(!cluster.said(A, lost) && !cluster.said(B, lost));
    assert_eq!(cluster.volume().epoch, epoch, "nobody left");

    // The new connection breaks at once: then the link is lost like any other.
    cluster.move_link(A);
    cluster.cut();
    cluster.until("the link is lost", |c| c.said(A, lost) && c.said(B, lost));
    cluster.cut = false;
    cluster.until("the peer is in sync again", |c| {
        c.volume().epoch > epoch && c.in_sync() == [A, B]
    });
    stop.store(true, Ordering::Relaxed);
    cluster.until("the client is done", |_| writer.is_finished());
    writer.join().unwrap();
    assert!(cluster.data(A) == cluster.data(B), "the replicas are equal");
}
