//! Strangers and broken members: whatever arrives on a port, honest peers go on.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use relevo_membership::{Heartbeat, PathEcho, PeerEcho};
use relevo_transport::{DataListener, HeartbeatKey, LinkDialer, Token, WantedLink};
use relevo_types::{ClusterId, Instance, LeaseGeneration, NodeId, VolumeId, cluster::Encryption};
use said::fuzz::{Random, fuzz, mutate};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::Handle,
    time::timeout,
};

use crate::{Cluster, any, rpc};

const LONG: Duration = Duration::from_secs(20);
const V: VolumeId = VolumeId(4);

/// The first bytes of a real client, as a port sees them.
async fn greeting(cluster: &Cluster) -> Vec<u8> {
    let listener = tokio::net::TcpListener::bind(any()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    let dial = tokio::spawn(async move {
        drop(
            dialer
                .dial(
                    NodeId(2),
                    &[address],
                    WantedLink::new(V, Encryption::On),
                    LONG,
                )
                .await,
        );
    });
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut bytes = vec![0; 4096];
    let count = stream.read(&mut bytes).await.unwrap();
    bytes.truncate(count);
    drop(stream);
    dial.await.unwrap();
    bytes
}

/// A stranger says something and leaves, or stays silent for a moment.
fn knock(random: &mut Random, port: SocketAddr, greeting: &[u8]) {
    let mut bytes = if random.one_in(3) {
        random.bytes(2000)
    } else {
        greeting.to_vec()
    };
    mutate(random, &mut bytes);
    let Ok(mut stream) = TcpStream::connect(port) else {
        return;
    };
    stream
        .set_read_timeout(Some(Duration::from_millis(2)))
        .unwrap();
    for piece in bytes.chunks(1 + random.below(1500)) {
        if stream.write_all(piece).is_err() {
            return;
        }
    }
    if random.one_in(2) && stream.shutdown(Shutdown::Write).is_err() {
        return;
    }
    // Whatever it answers, or nothing.
    drop(stream.read(&mut [0; 512]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_at_the_data_port_disturb_nobody() {
    let cluster = Cluster::new(1);
    let greeting = greeting(&cluster).await;
    let mut listener = DataListener::bind(
        &[any()],
        &cluster.node(2),
        Arc::new(|_, _| Ok(Encryption::On)),
    )
    .unwrap();
    let port = listener.addresses()[0];
    let knocking = tokio::task::spawn_blocking(move || {
        fuzz("strangers_at_the_data_port_disturb_nobody", |random| {
            knock(random, port, &greeting);
        });
    });
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    let mut links = 0;
    while links == 0 || !knocking.is_finished() {
        dialer
            .dial(NodeId(2), &[port], WantedLink::new(V, Encryption::On), LONG)
            .await
            .unwrap();
        let link = timeout(LONG, listener.accept()).await.unwrap().unwrap();
        assert_eq!((link.peer, link.volume), (NodeId(1), V));
        links += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    knocking.await.unwrap();
}

/// Requests, pings and pongs as a member sends them (the golden frames of the RPC), damaged.
fn rpc_stream(random: &mut Random) -> Vec<u8> {
    let frames: [&[u8]; 4] = [
        &[7, 0, 0, 0, 0, 0xac, 2, 3, 2, b'h', b'i'],
        &[7, 0, 0, 0, 1, 1, 1, 1, 2, b'n', b'o'],
        &[1, 0, 0, 0, 2],
        &[1, 0, 0, 0, 3],
    ];
    let mut bytes = Vec::new();
    for _ in 0..1 + random.below(8) {
        bytes.extend_from_slice(frames[random.below(frames.len())]);
    }
    mutate(random, &mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_talks_nonsense_disturbs_nobody() {
    let cluster = Arc::new(Cluster::new(1));
    let (server, _) = rpc::serve(&cluster.node(2));
    let port = server.addresses()[0];
    let honest = rpc::client(cluster.node(1), 2, &server.addresses());
    let broken = Arc::clone(&cluster);
    let runtime = Handle::current();
    let talking = tokio::task::spawn_blocking(move || {
        let identity = broken.node(3);
        fuzz("a_member_that_talks_nonsense_disturbs_nobody", |random| {
            let bytes = rpc_stream(random);
            runtime.block_on(async {
                let Ok(mut stream) = rpc::connect_as(&identity, port, &broken).await else {
                    return;
                };
                // It may be thrown out in the middle.
                if stream.write_all(&bytes).await.is_ok() && stream.flush().await.is_ok() {
                    let mut buffer = [0; 512];
                    let answer = stream.read(&mut buffer);
                    drop(timeout(Duration::from_millis(2), answer).await);
                }
            });
        });
    });
    let mut asked = 0;
    while asked == 0 || !talking.is_finished() {
        let answer = rpc::ask(&honest, 2, "hi").await.unwrap();
        assert_eq!(answer, "Some(n1) Report hi");
        asked += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    talking.await.unwrap();
}

fn heartbeat(random: &mut Random) -> Heartbeat {
    let peer = |random: &mut Random| PeerEcho {
        node: NodeId(u32::from(random.byte())),
        instance: Instance(random.number()),
        granted_round: random.tricky(),
        heard: random.one_in(2),
        alive: random.one_in(2),
        condemned: LeaseGeneration(random.tricky()),
    };
    Heartbeat {
        from: NodeId(1),
        instance: Instance(random.number()),
        round: random.tricky(),
        generation: LeaseGeneration(random.tricky()),
        voters: 1,
        peers: (0..random.below(8)).map(|_| peer(random)).collect(),
        echo: random.one_in(2).then(|| PathEcho {
            instance: Instance(random.number()),
            round: random.tricky(),
            held_us: u32::from(random.byte()),
        }),
    }
}

#[test]
fn an_altered_heartbeat_is_never_believed() {
    let cluster = ClusterId([7; 16]);
    let key = HeartbeatKey::new(&[9; 32]);
    fuzz("an_altered_heartbeat_is_never_believed", |random| {
        let heartbeat = heartbeat(random);
        let sealed = key.seal(cluster, &heartbeat);
        assert_eq!(key.open(cluster, &sealed), Some(heartbeat));
        let mut altered = sealed;
        if mutate(random, &mut altered) {
            assert_eq!(key.open(cluster, &altered), None);
        }
    });
}

/// A join token, with what happens to text that people copy.
#[test]
fn an_altered_token_is_never_believed() {
    let secret = relevo_transport::Fingerprint([2; 32]);
    fuzz("an_altered_token_is_never_believed", |random| {
        let token = Token {
            cluster: ClusterId([1; 16]),
            ca: secret,
            secret: [random.byte(); 16],
            addresses: vec![any(); 1 + random.below(4)],
            kind: None,
            expires_unix_s: random.tricky(),
        };
        let text = token.to_string();
        let mut bytes = text.clone().into_bytes();
        mutate(random, &mut bytes);
        let altered = String::from_utf8_lossy(&bytes);
        if let Ok(read) = altered.parse::<Token>() {
            assert_eq!(read, token, "{altered} for {text}");
        }
    });
}
