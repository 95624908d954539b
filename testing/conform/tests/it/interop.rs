//! Relevo's client against the servers of others.

use std::{
    fs,
    io::ErrorKind,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use relevo_export::{
    Errno,
    nbd::{Client, ClientError, NbdAddr},
};

use crate::{subject::noise, tools::missing};

const SIZE: usize = 4 << 20;
const LIMIT: Option<Duration> = Some(Duration::from_secs(20));

/// Killed when the test ends, whichever way.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended with its client.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start(command: &mut Command) -> Server {
    Server(command.stdin(Stdio::null()).spawn().unwrap())
}

/// Waits for the server: there is no socket yet, or one that nobody listens at yet.
fn connect(address: &NbdAddr, export: &str) -> Client {
    let mut looks = 4000;
    loop {
        looks -= 1;
        match Client::connect(address, export, LIMIT) {
            Err(ClientError::Connect { error, .. })
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) && looks > 0 =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            connected => return connected.unwrap(),
        }
    }
}

fn exercise(address: &NbdAddr, export: &str, expected: &mut [u8]) {
    let mut client = connect(address, export);
    assert_eq!(client.size(), SIZE as u64);
    let mut all = vec![0; SIZE];
    client.read(0, &mut all).unwrap();
    assert!(all == expected);
    let data = noise(1 << 20, 9);
    client.write(8192, &data, true).unwrap();
    expected[8192..8192 + data.len()].copy_from_slice(&data);
    client.write_zeroes(12_288, 4096, false).unwrap();
    expected[12_288..16_384].fill(0);
    client.flush().unwrap();
    client.read(0, &mut all).unwrap();
    assert!(all == expected);
    let past = client.read(SIZE as u64, &mut [0; 512]);
    assert!(
        matches!(past, Err(ClientError::Request(Errno::Invalid))),
        "{past:?}"
    );
    client.disconnect().unwrap();
}

#[test]
fn our_client_on_qemu_nbd() {
    if missing("our_client_on_qemu_nbd", "qemu-nbd") {
        return;
    }
    let dir = tempfile::Builder::new()
        .prefix("relevo-")
        .tempdir()
        .unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("sock"));
    let mut content = noise(SIZE, 8);
    fs::write(&image, &content).unwrap();
    let _server = start(
        Command::new("qemu-nbd")
            .args(["--format=raw", "--persistent", "--export-name=disk", "-k"])
            .args([&socket, &image]),
    );
    let address = NbdAddr::Unix(socket);
    exercise(&address, "disk", &mut content);
    let refused = Client::connect(&address, "none", LIMIT);
    assert!(
        matches!(refused, Err(ClientError::Refused { .. })),
        "{refused:?}"
    );
}

#[test]
fn our_client_on_nbdkit() {
    if missing("our_client_on_nbdkit", "nbdkit") {
        return;
    }
    let dir = tempfile::Builder::new()
        .prefix("relevo-")
        .tempdir()
        .unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("sock"));
    let mut content = noise(SIZE, 8);
    fs::write(&image, &content).unwrap();
    let _server = start(
        Command::new("nbdkit")
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket)
            .arg("file")
            .arg(&image),
    );
    exercise(&NbdAddr::Unix(socket), "", &mut content);
    assert!(fs::read(&image).unwrap() == content);
}
