use std::{
    io::{self, Read as _, Write as _},
    sync::Arc,
    time::Duration,
};

use relevo_transport::{DataListener, EstablishedLink, Identity, LinkAdmission, LinkDialer};
use relevo_types::{NodeId, VolumeId};
use relevo_wire::{Decoder, Message, encode};
use rustls::Connection;
use tokio::time::timeout;

use crate::{Cluster, any, nobody};

const LONG: Duration = Duration::from_secs(10);
const V: VolumeId = VolumeId(4);

fn admit_all() -> LinkAdmission {
    Arc::new(|_, _| Ok(()))
}

fn listen(identity: &Arc<Identity>, admission: LinkAdmission) -> DataListener {
    DataListener::bind(&[any()], identity, admission).unwrap()
}

/// Writes a message the way the data path does: TLS session and socket by hand.
fn send(link: &mut EstablishedLink, message: &Message) {
    link.stream.set_nonblocking(false).unwrap();
    let encoded = encode(message).unwrap();
    link.tls.writer().write_all(&encoded.head).unwrap();
    while link.tls.wants_write() {
        link.tls.write_tls(&mut link.stream).unwrap();
    }
}

fn receive(link: &mut EstablishedLink) -> Message {
    link.stream.set_nonblocking(false).unwrap();
    let mut decoder = Decoder::new();
    loop {
        let mut bytes = [0; 4096];
        match link.tls.reader().read(&mut bytes) {
            Ok(count) => {
                let mut input = &bytes[..count];
                while !input.is_empty() {
                    if let Some(message) = decoder.take(&mut input).unwrap() {
                        return message;
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(link.tls.read_tls(&mut link.stream).unwrap() > 0);
                link.tls.process_new_packets().unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_link_is_established_and_driven_by_hand() {
    let cluster = Cluster::new(1);
    let mut listener = listen(&cluster.node(2), admit_all());
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    let addresses = [nobody(), listener.addresses()[0]];
    let dialed = dialer.dial(NodeId(2), &addresses, V, LONG).await.unwrap();
    let accepted = timeout(LONG, listener.accept()).await.unwrap().unwrap();
    assert_eq!((dialed.peer, dialed.volume), (NodeId(2), V));
    assert_eq!((accepted.peer, accepted.volume), (NodeId(1), V));
    assert_eq!(dialed.protocol, accepted.protocol);
    assert_eq!(dialed.remote, addresses[1]);

    tokio::task::spawn_blocking(move || {
        let (mut dialed, mut accepted) = (dialed, accepted);
        assert!(matches!(dialed.tls, Connection::Client(_)));
        assert!(!dialed.tls.wants_write() && !accepted.tls.wants_write());
        assert_eq!(
            dialed.tls.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        assert!(accepted.stream.nodelay().unwrap());
        let mut probe = [0];
        let early = dialed.stream.read(&mut probe).unwrap_err();
        assert_eq!(
            early.kind(),
            io::ErrorKind::WouldBlock,
            "handed out non-blocking"
        );
        send(&mut dialed, &Message::Ping);
        assert_eq!(receive(&mut accepted), Message::Ping);
        send(&mut accepted, &Message::Pong);
        assert_eq!(receive(&mut dialed), Message::Pong);
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn strangers_and_refused_volumes_get_no_link() {
    let (ours, theirs) = (Cluster::new(1), Cluster::new(2));
    let only_v: LinkAdmission = Arc::new(|_, volume| {
        if volume == V {
            Ok(())
        } else {
            Err(format!("there is no volume {volume} here"))
        }
    });
    let mut listener = listen(&ours.node(2), only_v);
    let addresses = listener.addresses().to_vec();

    let stranger = LinkDialer::new(theirs.node(1)).unwrap();
    let error = stranger
        .dial(NodeId(2), &addresses, V, LONG)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("of another cluster"), "{error}");

    let dialer = LinkDialer::new(ours.node(1)).unwrap();
    let error = dialer
        .dial(NodeId(2), &addresses, VolumeId(9), LONG)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("may not have the volume"),
        "{error}"
    );

    let error = dialer
        .dial(NodeId(3), &addresses, V, LONG)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another node"), "{error}");

    // Still serving.
    dialer.dial(NodeId(2), &addresses, V, LONG).await.unwrap();
    let link = timeout(LONG, listener.accept()).await.unwrap().unwrap();
    assert_eq!(link.peer, NodeId(1));
}

#[tokio::test]
async fn a_peer_that_never_answers_ends_in_time() {
    let cluster = Cluster::new(1);
    let silent = std::net::TcpListener::bind(any()).unwrap();
    let addresses = [silent.local_addr().unwrap()];
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    let dial = dialer.dial(NodeId(2), &addresses, V, Duration::from_millis(100));
    let error = timeout(LONG, dial).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("within 100 ms"), "{error}");
}
