//! Becoming a member: what `init` and `join` do on the new machine, and how a member admits one.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use relevo_control::facts::Member;
use relevo_transport::{
    ClusterCa, Identity, NodeKey, RpcError, Token, identity::IdentityError, random, rpc,
};
use relevo_types::{
    ClusterId, NodeId, Sensitivity,
    cluster::{ClusterState, Command, NodeKind, NodeSpec, Ports},
};
use serde::{Deserialize, Serialize};

use crate::{
    api::{ApiError, ErrorKind, InitRequest, JoinRequest},
    local_store::NodeFile,
    membership_files::MemberFiles,
};

/// How long a joining machine waits for its admission: some tries of the control log.
const JOIN_TIMEOUT: Duration = Duration::from_secs(15);

/// What a joining machine sends, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JoinCall {
    secret: [u8; 16],
    spec: NodeSpec,
    /// Public key, DER.
    public_key: Vec<u8>,
}

/// What it gets.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JoinReply {
    node: NodeId,
    certificate: Vec<u8>,
    ca: Vec<u8>,
    /// PEM, for a node that may admit others.
    ca_key: Option<String>,
    cluster_name: String,
    sensitivity: Sensitivity,
    heartbeat_key: [u8; 32],
}

/// What a member needs to admit another.
#[derive(Debug)]
pub(crate) struct Admitter {
    pub(crate) ca: Arc<ClusterCa>,
    pub(crate) heartbeat_key: [u8; 32],
}

/// Seconds since 1970 by this machine's clock.
pub(crate) fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs())
}

/// Makes the identity of a new cluster with this machine as its first node, and the command that
/// begins its control log. Nothing is written yet.
pub(crate) fn new_cluster(request: InitRequest) -> Result<(MemberFiles, Command), ApiError> {
    let what = "no cluster was made";
    let internal = |e: IdentityError| internal(what, &e);
    let randomness =
        |e: random::NoRandomness| ApiError::new(ErrorKind::Internal, what, e.to_string(), "");
    let spec = complete(request.node, NodeKind::Data);
    check_addresses(&spec, what)?;
    let cluster = ClusterId(random::bytes().map_err(randomness)?);
    let heartbeat_key: [u8; 32] = random::bytes().map_err(randomness)?;
    let node = NodeId(1);
    let ca = ClusterCa::create(cluster).map_err(internal)?;
    let key = NodeKey::generate().map_err(internal)?;
    let certificate = ca
        .issue(&key.public_der(), node, &spec.name, spec.kind)
        .map_err(internal)?;
    let identity = Identity::assemble(cluster, ca.certificate().clone(), certificate, &key)
        .map_err(internal)?;
    let command = Command::Init {
        cluster,
        name: request.cluster.clone(),
        sensitivity: request.sensitivity,
        node: spec.clone(),
    };
    let files = MemberFiles {
        member: Member { cluster, node },
        identity: Arc::new(identity),
        ca: Some(Arc::new(ca)),
        node: NodeFile {
            cluster_name: request.cluster,
            sensitivity: request.sensitivity,
            spec,
            revision: 0,
            heartbeat_key,
        },
    };
    Ok((files, command))
}

/// Asks the cluster of a token to admit this machine. Nothing is written yet; the token is used
/// up when this succeeds.
pub(crate) async fn ask_to_join(request: JoinRequest) -> Result<MemberFiles, ApiError> {
    let what = "this machine did not join";
    let token: Token = request.token.trim().parse().map_err(|e| {
        let text = relevo_transport::TokenError::to_string(&e);
        let (why, remedy) = split_remedy(&text);
        ApiError::new(ErrorKind::BadRequest, what, why, remedy)
    })?;
    let spec = complete(request.node, request.kind);
    // Before the token is used up.
    check_addresses(&spec, what)?;
    let key = NodeKey::generate().map_err(|e| internal(what, &e))?;
    let call = JoinCall {
        secret: token.secret,
        spec: spec.clone(),
        public_key: key.public_der(),
    };
    let body = serde_json::to_vec(&call)
        .map_err(|e| ApiError::new(ErrorKind::Internal, what, e.to_string(), ""))?;
    let reply = rpc::join(&token.addresses, token.ca, Bytes::from(body), JOIN_TIMEOUT)
        .await
        .map_err(|e| join_failed(what, &token, &e))?;
    let reply: JoinReply = serde_json::from_slice(&reply).map_err(|e| {
        ApiError::new(
            ErrorKind::Internal,
            what,
            format!("the answer of the cluster was not understood: {e}"),
            "use the same version of relevo on all machines",
        )
    })?;
    member_files(&token, spec, &key, reply).map_err(|e| internal(what, &e))
}

fn member_files(
    token: &Token,
    spec: NodeSpec,
    key: &NodeKey,
    reply: JoinReply,
) -> Result<MemberFiles, IdentityError> {
    let cluster = token.cluster;
    let identity = Identity::assemble(
        cluster,
        reply.ca.clone().into(),
        reply.certificate.into(),
        key,
    )?;
    let ca = match &reply.ca_key {
        Some(ca_key) => Some(Arc::new(ClusterCa::from_parts(cluster, reply.ca, ca_key)?)),
        None => None,
    };
    Ok(MemberFiles {
        member: Member {
            cluster,
            node: reply.node,
        },
        identity: Arc::new(identity),
        ca,
        node: NodeFile {
            cluster_name: reply.cluster_name,
            sensitivity: reply.sensitivity,
            spec,
            revision: 0,
            heartbeat_key: reply.heartbeat_key,
        },
    })
}

fn join_failed(what: &str, token: &Token, error: &RpcError) -> ApiError {
    let text = error.to_string();
    match error {
        RpcError::Refused { .. } | RpcError::Failed { .. } => {
            let (why, remedy) = split_remedy(&text);
            ApiError::new(ErrorKind::Refused, what, why, remedy)
        }
        _ if error.may_have_happened() => ApiError::new(
            ErrorKind::Unavailable,
            what,
            format!("{text}; the cluster may have admitted it all the same"),
            "look at `relevo status` on a member; make a new token and use another node name if it did",
        ),
        // TLS tells a foreign CA apart from a silent address.
        _ if text.contains("fingerprint") || text.contains("another cluster") => ApiError::new(
            ErrorKind::Refused,
            what,
            format!("the token is of another cluster than the one that answers: {text}"),
            "make a token on a node of the cluster that this machine shall join",
        ),
        _ => ApiError::new(
            ErrorKind::Unavailable,
            what,
            format!(
                "no member answered at the token's addresses: {text} (cluster {})",
                token.cluster
            ),
            "check that a member's daemon runs and that its control port is reachable from here",
        ),
    }
}

impl JoinCall {
    pub(crate) const fn spec(&self) -> &NodeSpec {
        &self.spec
    }
}

impl Admitter {
    /// Checks what a machine sent and makes the command that admits it.
    pub(crate) fn command(body: &[u8]) -> Result<(JoinCall, Command), RpcError> {
        let call: JoinCall = serde_json::from_slice(body).map_err(|e| RpcError::Refused {
            why: format!(
                "the request to join was not understood ({e}); use the same version of relevo on all machines"
            ),
        })?;
        let command = Command::Join {
            hash: Token::hash_of(&call.secret),
            now_unix_s: unix_s(),
            node: call.spec.clone(),
        };
        Ok((call, command))
    }

    /// What an admitted machine gets.
    pub(crate) fn reply(
        &self,
        call: &JoinCall,
        node: NodeId,
        cluster_name: &str,
        sensitivity: Sensitivity,
    ) -> Result<Bytes, RpcError> {
        let failed = |why: String| RpcError::Failed { why };
        let certificate = self
            .ca
            .issue(&call.public_key, node, &call.spec.name, call.spec.kind)
            .map_err(|e| failed(e.to_string()))?;
        let (ca, ca_key) = self.ca.to_parts();
        let reply = JoinReply {
            node,
            certificate: certificate.to_vec(),
            ca,
            // A witness stands where nobody guards it: it admits nobody.
            ca_key: (call.spec.kind == NodeKind::Data).then_some(ca_key),
            cluster_name: cluster_name.to_owned(),
            sensitivity,
            heartbeat_key: self.heartbeat_key,
        };
        serde_json::to_vec(&reply)
            .map(Bytes::from)
            .map_err(|e| failed(e.to_string()))
    }
}

/// The request with what was left out filled in from this machine.
fn complete(request: crate::api::NodeRequest, kind: NodeKind) -> NodeSpec {
    request.into_spec(kind, &host_name(), default_address())
}

/// The host name up to its first dot; `node` when there is none that can be used.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim().split('.').next() {
        Some(short) if !short.is_empty() && short != "(none)" => short.to_owned(),
        _ => "node".to_owned(),
    }
}

/// The address from which this machine would reach others: that of the default route's
/// interface; loopback without one. Nothing is sent: connecting a datagram socket only asks the
/// kernel for a route (192.0.2.1 is for documentation, RFC 5737).
fn default_address() -> IpAddr {
    let route = || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    };
    route().map_or_else(|_| IpAddr::from([127, 0, 0, 1]), |address| address.ip())
}

/// Finds out before anything is made or used up whether this node could listen.
fn check_addresses(spec: &NodeSpec, what: &str) -> Result<(), ApiError> {
    let alone = ClusterState::default();
    alone.check_paths(spec).map_err(|rejection| {
        let text = rejection.to_string();
        let (why, remedy) = split_remedy(&text);
        ApiError::new(ErrorKind::BadRequest, what, why, remedy)
    })?;
    for path in &spec.paths {
        check_address(path.address, spec.ports, what)?;
    }
    Ok(())
}

/// Finds out whether this node could listen on an address.
pub(crate) fn check_address(address: IpAddr, ports: Ports, what: &str) -> Result<(), ApiError> {
    let at = |port| SocketAddr::new(address, port);
    let tried = [
        (
            "TCP",
            ports.control,
            TcpListener::bind(at(ports.control)).err(),
        ),
        (
            "UDP",
            ports.heartbeat,
            UdpSocket::bind(at(ports.heartbeat)).err(),
        ),
        ("TCP", ports.data, TcpListener::bind(at(ports.data)).err()),
    ];
    for (protocol, port, error) in tried {
        if let Some(error) = error {
            return Err(cannot_listen(what, protocol, at(port), &error));
        }
    }
    Ok(())
}

fn cannot_listen(
    what: &str,
    protocol: &str,
    address: SocketAddr,
    error: &std::io::Error,
) -> ApiError {
    let (why, remedy) = match error.kind() {
        std::io::ErrorKind::AddrInUse => (
            format!("another program listens on {address} ({protocol}) already"),
            "stop that program, or choose the first of three free ports with --ports".to_owned(),
        ),
        std::io::ErrorKind::AddrNotAvailable => (
            format!("{} is no address of this machine", address.ip()),
            "give an address of this machine with --path NAME=IP".to_owned(),
        ),
        _ => (
            format!("can't listen on {address} ({protocol}): {error}"),
            "choose other ports with --ports, or another address with --path".to_owned(),
        ),
    };
    ApiError::new(ErrorKind::Refused, what, why, remedy)
}

fn internal(what: &str, error: &IdentityError) -> ApiError {
    ApiError::new(ErrorKind::Internal, what, error.to_string(), "")
}

/// Texts of the lower crates end with `; what to do`.
pub(crate) fn split_remedy(text: &str) -> (String, String) {
    match text.rsplit_once("; ") {
        Some((why, remedy)) => (why.to_owned(), remedy.to_owned()),
        None => (text.to_owned(), String::new()),
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::cluster::NodePath;

    use super::*;

    fn spec(paths: &[(&str, &str)], ports: Ports) -> NodeSpec {
        NodeSpec {
            name: "alfa".to_owned(),
            kind: NodeKind::Data,
            paths: paths
                .iter()
                .map(|(name, address)| NodePath {
                    name: (*name).to_owned(),
                    address: address.parse().unwrap(),
                    replication: false,
                })
                .collect(),
            streams: Vec::new(),
            ports,
        }
    }

    #[test]
    fn a_port_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let ports = Ports {
            control: 0,
            heartbeat: 0,
            data: port,
        };
        let error = check_addresses(&spec(&[("lan", "127.0.0.1")], ports), "x").unwrap_err();
        assert!(error.reason.contains(&port.to_string()), "{error}");
        assert!(error.remedy.contains("--ports"), "{error}");
    }

    #[test]
    fn a_path_twice() {
        let ports = Ports {
            control: 0,
            heartbeat: 0,
            data: 0,
        };
        let spec = spec(&[("lan", "127.0.0.1"), ("lan", "127.0.0.2")], ports);
        assert!(
            check_addresses(&spec, "x")
                .unwrap_err()
                .reason
                .contains("has a path `lan` already")
        );
    }

    #[test]
    fn a_new_cluster_and_its_first_guest() {
        let request = InitRequest {
            cluster: "campus".to_owned(),
            sensitivity: Sensitivity::Normal,
            node: crate::api::NodeRequest {
                name: Some("alfa".to_owned()),
                paths: vec![crate::api::PathRequest {
                    name: "lan".to_owned(),
                    address: "127.0.0.1".parse().unwrap(),
                    replication: false,
                }],
                ports: Ports {
                    control: 0,
                    heartbeat: 0,
                    data: 0,
                },
            },
        };
        let (files, command) = new_cluster(request).unwrap();
        assert!(matches!(command, Command::Init { .. }));
        let admitter = Admitter {
            ca: files.ca.clone().unwrap(),
            heartbeat_key: files.node.heartbeat_key,
        };
        let key = NodeKey::generate().unwrap();
        let call = JoinCall {
            secret: [5; 16],
            spec: spec(&[("lan", "127.0.0.1")], Ports::default()),
            public_key: key.public_der(),
        };
        let body = serde_json::to_vec(&call).unwrap();
        let (call, command) = Admitter::command(&body).unwrap();
        assert!(matches!(command, Command::Join { hash, .. } if hash == Token::hash_of(&[5; 16])));
        let reply = admitter
            .reply(&call, NodeId(2), "campus", Sensitivity::Normal)
            .unwrap();
        let reply: JoinReply = serde_json::from_slice(&reply).unwrap();
        let token = Token::generate(
            files.member.cluster,
            files.identity.ca_fingerprint(),
            vec!["127.0.0.1:1".parse().unwrap()],
            None,
            0,
        )
        .unwrap();
        let guest = member_files(&token, call.spec, &key, reply).unwrap();
        assert_eq!(guest.member.node, NodeId(2));
        assert!(guest.ca.is_some());

        let dir = tempfile::tempdir().unwrap();
        let places = crate::membership_files::Places::new(dir.path());
        assert!(places.load().unwrap().is_none());
        places.save(&guest).unwrap();
        let read = places.load().unwrap().unwrap();
        assert_eq!(read.member, guest.member);
        assert_eq!(read.node, guest.node);
        assert!(read.ca.is_some());
        places.wipe().unwrap();
        assert!(places.load().unwrap().is_none());
    }
}
