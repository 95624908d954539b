use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use relevo_transport::{
    Fingerprint, Identity, Method, RpcClient, RpcConfig, RpcError, RpcHandler, RpcServer,
    identity::describe_tls_error, rpc::join,
};
use relevo_types::NodeId;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{Cluster, any, nobody};

const LONG: Duration = Duration::from_secs(10);

/// Says who asked what; waits when asked to `wait`; counts.
#[derive(Default)]
pub(crate) struct Echo {
    handled: AtomicUsize,
}

#[async_trait::async_trait]
impl RpcHandler for Echo {
    async fn handle(
        &self,
        peer: Option<NodeId>,
        method: Method,
        body: Bytes,
    ) -> Result<Bytes, RpcError> {
        self.handled.fetch_add(1, Ordering::Relaxed);
        match &body[..] {
            b"wait" => sleep(Duration::from_millis(1500)).await,
            b"refuse" => {
                let why = "not today".to_owned();
                return Err(RpcError::Refused { why });
            }
            b"fail" => {
                let why = "it broke".to_owned();
                return Err(RpcError::Failed { why });
            }
            b"big" => return Ok(vec![0; relevo_transport::rpc::MAX_FRAME_BYTES].into()),
            _ => {}
        }
        Ok(format!("{peer:?} {method:?} {}", String::from_utf8_lossy(&body)).into())
    }
}

pub(crate) fn serve(identity: &Arc<Identity>) -> (RpcServer, Arc<Echo>) {
    let handler = Arc::new(Echo::default());
    let server = RpcServer::bind(&[any()], identity, Arc::clone(&handler) as _).unwrap();
    (server, handler)
}

pub(crate) fn client(identity: Arc<Identity>, peer: u32, addresses: &[SocketAddr]) -> RpcClient {
    let client = RpcClient::new(identity, RpcConfig::default()).unwrap();
    client.set_peers(&BTreeMap::from([(NodeId(peer), addresses.to_vec())]));
    client
}

pub(crate) async fn ask(
    client: &RpcClient,
    peer: u32,
    text: &'static str,
) -> Result<String, RpcError> {
    let body = Bytes::from_static(text.as_bytes());
    let answer = client
        .call(NodeId(peer), Method::Report, body, LONG)
        .await?;
    Ok(String::from_utf8(answer.to_vec()).unwrap())
}

#[tokio::test]
async fn requests_are_answered_and_errors_come_back() {
    let cluster = Cluster::new(1);
    let (server, _) = serve(&cluster.node(2));
    let client = client(cluster.node(1), 2, &server.addresses());
    assert_eq!(ask(&client, 2, "hi").await.unwrap(), "Some(n1) Report hi");
    assert_eq!(
        ask(&client, 2, "refuse").await,
        Err(RpcError::Refused {
            why: "not today".to_owned()
        })
    );
    assert_eq!(
        ask(&client, 2, "fail").await,
        Err(RpcError::Failed {
            why: "it broke".to_owned()
        })
    );
    let error = ask(&client, 2, "big").await.unwrap_err().to_string();
    assert!(error.contains("longer than allowed"), "{error}");
    let error = ask(&client, 7, "hi").await.unwrap_err().to_string();
    assert!(error.contains("addresses are not known"), "{error}");
}

#[tokio::test]
async fn a_slow_request_holds_up_nobody_and_keeps_its_connection() {
    let cluster = Cluster::new(1);
    let (server, handler) = serve(&cluster.node(2));
    let client = client(cluster.node(1), 2, &server.addresses());
    // Slower than the silence bound: pings prove that the peer lives.
    let slow = ask(&client, 2, "wait");
    let quick = async {
        for _ in 0..100 {
            ask(&client, 2, "q").await.unwrap();
        }
        handler.handled.load(Ordering::Relaxed)
    };
    let (slow, handled) = timeout(LONG, async { tokio::join!(slow, quick) })
        .await
        .unwrap();
    assert_eq!(slow.unwrap(), "Some(n1) Report wait");
    assert_eq!(handled, 101);
}

#[tokio::test]
async fn the_next_path_is_taken_and_a_restarted_peer_is_found() {
    let cluster = Cluster::new(1);
    let identity = cluster.node(2);
    let (server, _) = serve(&identity);
    let live = server.addresses()[0];
    let client = client(cluster.node(1), 2, &[nobody(), live]);
    ask(&client, 2, "hi").await.unwrap();
    drop(server);
    let handler = Arc::new(Echo::default());
    let mut server = None;
    for _ in 0..100 {
        match RpcServer::bind(&[live], &identity, Arc::clone(&handler) as _) {
            Ok(bound) => {
                server = Some(bound);
                break;
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
    assert!(server.is_some());
    for _ in 0..100 {
        if ask(&client, 2, "again").await.is_ok() {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("not reconnected: {:?}", client.trouble_with(NodeId(2)));
}

#[tokio::test]
async fn a_dead_peer_is_reported_long_before_the_time_out() {
    let cluster = Cluster::new(1);
    let client = client(cluster.node(1), 2, &[nobody(), nobody()]);
    let error = timeout(LONG / 2, ask(&client, 2, "hi"))
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, RpcError::Unreachable { .. }), "{error}");
    assert!(!error.may_have_happened());
}

/// Passes bytes on until it is told to swallow them: a path that goes dead without a word.
async fn dead_end(to: SocketAddr) -> (SocketAddr, watch::Sender<bool>) {
    let listener = TcpListener::bind(any()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (silence, silent) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut silent = silent.clone();
            tokio::spawn(async move {
                if !*silent.borrow() {
                    let mut far = TcpStream::connect(to).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => return,
                        _ = silent.wait_for(|silent| *silent) => {}
                    }
                }
                std::future::pending::<()>().await;
            });
        }
    });
    (address, silence)
}

#[tokio::test]
async fn a_path_that_falls_silent_is_left() {
    let cluster = Cluster::new(1);
    let (server, _) = serve(&cluster.node(2));
    let (path, silence) = dead_end(server.addresses()[0]).await;
    let client = client(cluster.node(1), 2, &[path, server.addresses()[0]]);
    ask(&client, 2, "hi").await.unwrap();
    silence.send_replace(true);
    let error = timeout(LONG / 2, ask(&client, 2, "lost"))
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, RpcError::Lost { .. }), "{error}");
    assert!(error.may_have_happened());
    assert_eq!(ask(&client, 2, "hi").await.unwrap(), "Some(n1) Report hi");
}

#[tokio::test]
async fn a_server_of_another_cluster_is_refused() {
    // The second has the same id: only the CA tells it apart.
    let ours = Cluster::new(1);
    for theirs in [Cluster::new(2), Cluster::new(1)] {
        let (server, handler) = serve(&theirs.node(2));
        let client = client(ours.node(1), 2, &server.addresses());
        let error = ask(&client, 2, "hi").await.unwrap_err().to_string();
        assert!(error.contains("of another cluster"), "{error}");
        assert_eq!(handler.handled.load(Ordering::Relaxed), 0);
    }
}

/// A connection of a client that trusts any server but shows the certificate of `identity`.
pub(crate) async fn connect_as(
    identity: &Identity,
    server: SocketAddr,
    trusted: &Cluster,
) -> io::Result<TlsStream<TcpStream>> {
    let dir = tempfile::tempdir().unwrap();
    identity.save(dir.path()).unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.path().join("node.key")).unwrap();
    let certificate = CertificateDer::from_pem_file(dir.path().join("node.crt")).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(trusted.ca.certificate().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = vec![b"relevo-rpc/1".to_vec()];
    let name = format!("node-2.{}.relevo", trusted.id).try_into().unwrap();
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

async fn intruder(identity: &Identity, server: SocketAddr, trusted: &Cluster) -> io::Result<usize> {
    let mut stream = connect_as(identity, server, trusted).await?;
    stream.write_all(&[1, 0, 0, 0, 2]).await?; // a ping
    stream.flush().await?;
    stream.read(&mut [0; 16]).await
}

#[tokio::test]
async fn a_client_of_another_cluster_is_refused() {
    let ours = Cluster::new(1);
    let (server, handler) = serve(&ours.node(2));
    let address = server.addresses()[0];
    let answered = intruder(&ours.node(1), address, &ours).await.unwrap();
    assert_eq!(answered, 5, "a pong for a member");
    for theirs in [Cluster::new(2), Cluster::new(1)] {
        let error = intruder(&theirs.node(1), address, &ours).await.unwrap_err();
        let why = describe_tls_error(&error);
        assert!(why.contains("it belongs to another cluster"), "{why}");
    }
    assert_eq!(handler.handled.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn another_node_at_the_address_is_noticed() {
    let cluster = Cluster::new(1);
    let (server, handler) = serve(&cluster.node(3));
    let client = client(cluster.node(1), 2, &server.addresses());
    let error = ask(&client, 2, "hi").await.unwrap_err().to_string();
    assert!(
        error.contains("another node of the cluster answers"),
        "{error}"
    );
    assert_eq!(handler.handled.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_machine_with_the_fingerprint_can_only_ask_to_join() {
    let cluster = Cluster::new(1);
    let (server, _) = serve(&cluster.node(1));
    let addresses = [nobody(), server.addresses()[0]];
    let pin = cluster.ca.fingerprint();
    let answer = join(&addresses, pin, Bytes::from_static(b"me"), LONG)
        .await
        .unwrap();
    assert_eq!(answer, Bytes::from_static(b"None Join me"));

    let wrong = Fingerprint([7; 32]);
    let error = join(&addresses, wrong, Bytes::from_static(b"me"), LONG)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("of another cluster"), "{error}");
}

#[tokio::test]
async fn without_a_certificate_other_methods_are_refused() {
    let cluster = Cluster::new(1);
    let (server, handler) = serve(&cluster.node(1));
    for method in [
        Method::Raft,
        Method::Propose,
        Method::Report,
        Method::Api,
        Method::Fence,
    ] {
        let pin = cluster.ca.fingerprint();
        let addresses = server.addresses();
        let asked = relevo_transport::rpc::call_as_stranger(
            &addresses,
            pin,
            method,
            Bytes::from_static(b"x"),
            LONG,
        );
        let error = asked.await.unwrap_err();
        assert!(matches!(error, RpcError::Refused { .. }), "{error}");
    }
    assert_eq!(handler.handled.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn garbage_closes_its_connection_and_disturbs_nobody() {
    let cluster = Cluster::new(1);
    let (server, _) = serve(&cluster.node(2));
    let client = client(cluster.node(1), 2, &server.addresses());
    ask(&client, 2, "hi").await.unwrap();
    let mut stranger = TcpStream::connect(server.addresses()[0]).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    timeout(LONG, stranger.read_to_end(&mut rest))
        .await
        .unwrap()
        .ok();
    assert_eq!(ask(&client, 2, "hi").await.unwrap(), "Some(n1) Report hi");
}

#[tokio::test]
async fn a_port_in_use_is_explained() {
    let cluster = Cluster::new(1);
    let (server, handler) = serve(&cluster.node(1));
    let taken = server.addresses()[0];
    let error = RpcServer::bind(&[taken], &cluster.node(1), handler).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&taken.to_string()) && text.contains("another program"),
        "{text}"
    );
}

/// The server gets a path and loses one, the client is told a moment later: every request is answered, and those
/// that were under way on the old path too.
#[tokio::test]
async fn a_path_is_replaced_and_no_request_is_lost() {
    let cluster = Cluster::new(1);
    let (server, _) = serve(&cluster.node(2));
    let old = server.addresses();
    let client = client(cluster.node(1), 2, &old);
    ask(&client, 2, "q").await.unwrap();
    let more: Vec<SocketAddr> = ["127.0.0.2:0", "127.0.0.1:0"]
        .map(|address| address.parse().unwrap())
        .to_vec();
    assert!(server.listeners().listen_on(&more).is_empty());
    assert_eq!(server.addresses().len(), 2);
    let new: Vec<SocketAddr> = server.addresses();
    let new: Vec<SocketAddr> = new.into_iter().filter(|it| !old.contains(it)).collect();
    assert_eq!(new.len(), 1);
    // What was asked for first is gone.
    assert!(server.listeners().listen_on(&more[..1]).is_empty());
    assert_eq!(server.addresses(), new);
    ask(&client, 2, "the old connection lives").await.unwrap();
    let slow = ask(&client, 2, "wait");
    let replace = async {
        for _ in 0..20 {
            ask(&client, 2, "q").await.unwrap();
        }
        client.set_peers(&BTreeMap::from([(NodeId(2), new.clone())]));
        for _ in 0..20 {
            tokio::task::yield_now().await;
            ask(&client, 2, "q").await.unwrap();
        }
    };
    let ((), slow) = timeout(LONG, async { tokio::join!(replace, slow) })
        .await
        .unwrap();
    assert_eq!(slow.unwrap(), "Some(n1) Report wait");
    for address in old {
        assert!(TcpStream::connect(address).await.is_err(), "nobody listens");
    }
    let foreign = "192.0.2.1:1".parse().unwrap();
    let failed = server.listeners().listen_on(&[more[0], foreign]);
    assert_eq!(failed.len(), 1);
    assert!(failed[0].1.to_string().contains("192.0.2.1"), "{failed:?}");
}
