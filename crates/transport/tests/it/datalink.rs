use std::{
    io::{self, Read as _, Write as _},
    sync::Arc,
    time::Duration,
};

use relevo_transport::{
    DataListener, EstablishedLink, Identity, LinkAdmission, LinkDialer, WantedLink,
};
use relevo_types::{
    NodeId, VolumeId,
    cluster::Encryption::{self, Off, On},
};
use relevo_wire::{Decoder, Message, encode};
use rustls::Connection;
use tokio::time::timeout;

use crate::{Cluster, any, nobody};

const LONG: Duration = Duration::from_secs(10);
const V: VolumeId = VolumeId(4);

fn admit_all(encryption: Encryption) -> LinkAdmission {
    Arc::new(move |_, _| Ok(encryption))
}

fn listen(identity: &Arc<Identity>, admission: LinkAdmission) -> DataListener {
    DataListener::bind(&[any()], identity, admission).unwrap()
}

/// Writes a message the way the data path does: TLS session and socket by hand.
fn send(link: &mut EstablishedLink, message: &Message) {
    link.stream.set_nonblocking(false).unwrap();
    let encoded = encode(message).unwrap();
    let Some(tls) = &mut link.tls else {
        return link.stream.write_all(&encoded.head).unwrap();
    };
    tls.writer().write_all(&encoded.head).unwrap();
    while tls.wants_write() {
        tls.write_tls(&mut link.stream).unwrap();
    }
}

fn receive(link: &mut EstablishedLink) -> Message {
    link.stream.set_nonblocking(false).unwrap();
    let mut decoder = Decoder::new();
    loop {
        let mut bytes = [0; 4096];
        let read = match &mut link.tls {
            Some(tls) => tls.reader().read(&mut bytes),
            None => link.stream.read(&mut bytes),
        };
        match read {
            Ok(count) => {
                let mut input = &bytes[..count];
                while !input.is_empty() {
                    if let Some(message) = decoder.take(&mut input).unwrap() {
                        return message;
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let tls = link.tls.as_mut().unwrap();
                assert!(tls.read_tls(&mut link.stream).unwrap() > 0);
                tls.process_new_packets().unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_link_is_established_and_driven_by_hand() {
    let cluster = Cluster::new(1);
    let mut listener = listen(&cluster.node(2), admit_all(On));
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    let addresses = [nobody(), listener.addresses()[0]];
    let dialed = dialer
        .dial(NodeId(2), &addresses, WantedLink::new(V, On), LONG)
        .await
        .unwrap();
    let accepted = timeout(LONG, listener.accept()).await.unwrap().unwrap();
    assert_eq!((dialed.peer, dialed.volume), (NodeId(2), V));
    assert_eq!((accepted.peer, accepted.volume), (NodeId(1), V));
    assert_eq!(dialed.protocol, accepted.protocol);
    assert_eq!(dialed.remote, addresses[1]);

    tokio::task::spawn_blocking(move || {
        let (mut dialed, mut accepted) = (dialed, accepted);
        let tls = [dialed.tls.as_ref().unwrap(), accepted.tls.as_ref().unwrap()];
        assert!(matches!(tls[0], Connection::Client(_)));
        assert!(!tls[0].wants_write() && !tls[1].wants_write());
        assert_eq!(
            tls[0].protocol_version(),
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
            Ok(On)
        } else {
            Err(format!("there is no volume {volume} here"))
        }
    });
    let mut listener = listen(&ours.node(2), only_v);
    let addresses = listener.addresses();

    let stranger = LinkDialer::new(theirs.node(1)).unwrap();
    let error = stranger
        .dial(NodeId(2), &addresses, WantedLink::new(V, On), LONG)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("of another cluster"), "{error}");

    let dialer = LinkDialer::new(ours.node(1)).unwrap();
    let error = dialer
        .dial(
            NodeId(2),
            &addresses,
            WantedLink::new(VolumeId(9), On),
            LONG,
        )
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("may not have the volume"),
        "{error}"
    );

    let error = dialer
        .dial(NodeId(3), &addresses, WantedLink::new(V, On), LONG)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another node"), "{error}");

    // Still serving.
    dialer
        .dial(NodeId(2), &addresses, WantedLink::new(V, On), LONG)
        .await
        .unwrap();
    let link = timeout(LONG, listener.accept()).await.unwrap().unwrap();
    assert_eq!(link.peer, NodeId(1));
}

#[tokio::test]
async fn a_peer_that_never_answers_ends_in_time() {
    let cluster = Cluster::new(1);
    let silent = std::net::TcpListener::bind(any()).unwrap();
    let addresses = [silent.local_addr().unwrap()];
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    let dial = dialer.dial(
        NodeId(2),
        &addresses,
        WantedLink::new(V, On),
        Duration::from_millis(100),
    );
    let error = timeout(LONG, dial).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("within 100 ms"), "{error}");
}

/// What one end says is on the socket as it is, and both ends understand it from the first byte on,
/// whoever speaks first.
#[tokio::test]
async fn a_link_without_encryption_is_plain_after_the_greetings() {
    let cluster = Cluster::new(1);
    let mut listener = listen(&cluster.node(2), admit_all(Off));
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    let addresses = listener.addresses();
    for accepted_first in [false, true] {
        let dialed = dialer
            .dial(NodeId(2), &addresses, WantedLink::new(V, Off), LONG)
            .await;
        let dialed = dialed.unwrap();
        let accepted = timeout(LONG, listener.accept()).await.unwrap().unwrap();
        assert_eq!((dialed.encryption(), accepted.encryption()), (Off, Off));
        assert_eq!((dialed.peer, accepted.peer), (NodeId(2), NodeId(1)));
        tokio::task::spawn_blocking(move || {
            let (mut one, mut other) = if accepted_first {
                (accepted, dialed)
            } else {
                (dialed, accepted)
            };
            send(&mut one, &Message::Ping);
            send(&mut other, &Message::Pong);
            let plain = encode(&Message::Ping).unwrap().head;
            let mut peeked = vec![0; plain.len() + 1];
            other.stream.set_nonblocking(false).unwrap();
            assert_eq!(other.stream.peek(&mut peeked).unwrap(), plain.len());
            assert_eq!(peeked[..plain.len()], plain);
            assert_eq!(receive(&mut other), Message::Ping);
            assert_eq!(receive(&mut one), Message::Pong);
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn two_that_differ_in_encryption_get_no_link() {
    let cluster = Cluster::new(1);
    let dialer = LinkDialer::new(cluster.node(1)).unwrap();
    for (ours, theirs) in [(On, Off), (Off, On)] {
        let mut listener = listen(&cluster.node(2), admit_all(theirs));
        let addresses = listener.addresses();
        let dial = dialer
            .dial(NodeId(2), &addresses, WantedLink::new(V, ours), LONG)
            .await;
        let error = dial.unwrap_err().to_string();
        let words = format!(
            "encryption is `{}` here and `{}` at the other side",
            ours.word(),
            theirs.word()
        );
        assert!(error.contains(&words), "{error}");
        let accepted = timeout(Duration::from_millis(200), listener.accept()).await;
        assert!(accepted.is_err(), "the listening side refuses it too");
    }
}
