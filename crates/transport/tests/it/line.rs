//! Heartbeats on byte streams: a pseudo terminal stands for a serial line, and Unix sockets.

use std::{io, os::fd::OwnedFd, path::PathBuf, time::Duration};

use relevo_membership::{Heartbeat, PeerEcho};
use relevo_transport::{HeartbeatKey, HeartbeatLine, HeartbeatSockets, PathChange, line};
use relevo_types::{ClusterId, Instance, LeaseGeneration, NodeId, Time, cluster::Line};
use rustix::{
    fs::{OFlags, fcntl_setfl},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios,
};

const CLUSTER: ClusterId = ClusterId([7; 16]);

fn key() -> HeartbeatKey {
    HeartbeatKey::new(&[1; 32])
}

fn heartbeat(round: u64) -> Heartbeat {
    Heartbeat {
        from: NodeId(1),
        instance: Instance(u64::MAX),
        round,
        generation: LeaseGeneration(1),
        voters: 1,
        peers: vec![PeerEcho {
            node: NodeId(2),
            instance: Instance(u64::MAX),
            granted_round: round,
            heard: true,
            alive: true,
            condemned: LeaseGeneration(0),
        }],
        echo: None,
    }
}

fn ms(value: u64) -> Time {
    Time(value * 1_000_000)
}

/// The far end of a cable whose near end is a serial device.
fn cable() -> (OwnedFd, PathBuf) {
    let far = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&far).unwrap();
    unlockpt(&far).unwrap();
    fcntl_setfl(&far, OFlags::NONBLOCK).unwrap();
    let name = ptsname(&far, Vec::new()).unwrap();
    (far, PathBuf::from(name.to_str().unwrap()))
}

/// Reads for a moment.
fn rounds(end: &mut HeartbeatLine) -> Vec<u64> {
    let mut rounds = Vec::new();
    for _ in 0..20 {
        rounds.extend(
            end.receive()
                .unwrap()
                .iter()
                .map(|heartbeat| heartbeat.round),
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    rounds
}

fn serial(device: &std::path::Path, baud: u32) -> Line {
    Line::Serial {
        device: device.to_owned(),
        baud,
    }
}

#[test]
fn a_serial_line_is_raw_and_finds_its_way_back_after_noise() {
    let (far, device) = cable();
    let config = serial(&device, 115_200);
    let near = line::open_serial(&device, 115_200).unwrap();
    let settings = termios::tcgetattr(&near).unwrap();
    assert_eq!(settings.output_speed(), 115_200);
    assert!(!settings.local_modes.contains(termios::LocalModes::ECHO));
    let (mut near, _ended) = HeartbeatLine::new("ser", near, &config, CLUSTER, key());
    let noise = |bytes: &[u8]| rustix::io::write(&far, bytes).unwrap();
    let framed = |round| {
        let sealed = key().seal_short(CLUSTER, &heartbeat(round));
        relevo_transport::framing::frame(&sealed).unwrap()
    };

    // What a getty says, half a frame, a frame with an altered byte, every byte that a terminal would eat.
    noise(b"login: \r\n");
    let half = framed(1);
    noise(&half[..half.len() / 2]);
    noise(&framed(2));
    let mut altered = framed(3);
    altered[9] ^= 0x10;
    noise(&altered);
    noise(&[3, 4, 17, 19, 26, 28, 127, 255, 13]);
    let (stranger, _) = HeartbeatLine::new(
        "ser",
        rustix::io::fcntl_dupfd_cloexec(&far, 0).unwrap(),
        &config,
        ClusterId([8; 16]),
        key(),
    );
    let mut stranger = stranger;
    assert!(stranger.send(ms(0), &heartbeat(4)).unwrap());
    noise(&framed(5));
    assert_eq!(rounds(&mut near), [2, 5]);
    assert!(near.ignored() >= 4, "{}", near.ignored());

    // And back.
    let (mut far, _) = HeartbeatLine::new("ser", far, &config, CLUSTER, key());
    assert!(near.send(ms(0), &heartbeat(6)).unwrap());
    assert_eq!(rounds(&mut far), [6]);
}

#[test]
fn a_slow_line_carries_what_it_can_and_nothing_waits() {
    let (far, device) = cable();
    let config = serial(&device, 9600);
    let near = line::open_serial(&device, 9600).unwrap();
    let (mut near, _ended) = HeartbeatLine::new("ser", near, &config, CLUSTER, key());
    let (mut far, _) = HeartbeatLine::new("ser", far, &config, CLUSTER, key());
    // Some 70 bytes take 73 ms: of ten heartbeats a second, 50 ms apart, every second one goes out.
    let sent: Vec<u64> = (0..20)
        .filter(|round| near.send(ms(round * 50), &heartbeat(*round)).unwrap())
        .collect();
    assert_eq!(sent, (0..20).step_by(2).collect::<Vec<_>>());
    assert_eq!(rounds(&mut far), sent);
}

/// Nobody reads: what is under way stays what the kernel's buffer for one or two heartbeats holds.
#[test]
fn a_peer_that_stands_still_finds_no_pile_of_old_heartbeats() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("line.sock");
    let config = Line::Unix(path);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (one, other) =
        runtime.block_on(async { tokio::join!(line::open(&config), line::open(&config)) });
    let (mut one, _ended) = HeartbeatLine::new("line", one.unwrap(), &config, CLUSTER, key());
    let (mut other, _kept) = HeartbeatLine::new("line", other.unwrap(), &config, CLUSTER, key());
    let sent = (1..=1000)
        .filter(|round| one.send(ms(round * 100), &heartbeat(*round)).unwrap())
        .count();
    assert!((1..=4).contains(&sent), "{sent}");
    assert_eq!(rounds(&mut other).len(), sent);
    assert!(one.send(ms(200_000), &heartbeat(2000)).unwrap());
    assert_eq!(rounds(&mut other), [2000]);
}

#[test]
fn ends_of_a_socket_find_each_other_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("line.sock");
    let config = Line::Unix(path.clone());
    // Of a daemon that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for first in [true, false, true] {
            let late = async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                line::open(&config).await
            };
            let (one, other) = if first {
                tokio::join!(line::open(&config), late)
            } else {
                tokio::join!(late, line::open(&config))
            };
            assert!(!path.exists(), "nobody listens");
            let (mut one, ended) =
                HeartbeatLine::new("line", one.unwrap(), &config, CLUSTER, key());
            one.send(ms(0), &heartbeat(1)).unwrap();
            let mut sockets = HeartbeatSockets::new(Vec::new()).unwrap();
            let (other, other_ended) =
                HeartbeatLine::new("line", other.unwrap(), &config, CLUSTER, key());
            sockets.change(PathChange::Line(other));
            sockets.wait(Duration::from_secs(5)).unwrap();
            let (received, errors) = sockets.drain();
            assert_eq!((received.len(), errors.len()), (1, 0));
            assert_eq!(received[0].path, "line");
            drop(one);
            assert!(ended.await.is_err(), "one that was dropped says nothing");
            sockets.wait(Duration::from_secs(5)).unwrap();
            sockets.drain();
            let why = other_ended.await.unwrap();
            assert_eq!(why.kind(), io::ErrorKind::UnexpectedEof);
        }
    });
}

/// Both took the same leftover away: the later one's socket is the one that counts.
#[test]
fn who_listens_where_nobody_looks_notices() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("line.sock");
    let config = Line::Unix(path.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let replace = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            std::fs::remove_file(&path).unwrap();
            let listener = tokio::net::UnixListener::bind(&path).unwrap();
            listener.accept().await.unwrap()
        };
        let both = async { tokio::join!(line::open(&config), replace) };
        let (opened, _accepted) = tokio::time::timeout(Duration::from_secs(5), both)
            .await
            .unwrap();
        opened.unwrap();
    });
}

#[test]
fn what_can_t_be_opened_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = line::open_serial(&file, 9600).unwrap_err().to_string();
    assert!(error.contains("no serial line"), "{error}");
    let error = line::open_serial(&dir.path().join("x"), 9600).unwrap_err();
    assert!(error.to_string().contains("no such device"), "{error}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for path in [file.clone(), dir.path().join("no/line.sock")] {
        let error = runtime.block_on(line::open(&Line::Unix(path))).unwrap_err();
        assert!(
            error.to_string().contains("can't use the socket"),
            "{error}"
        );
    }
    assert!(file.exists(), "a file is not taken for a socket");
}
