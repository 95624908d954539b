//! Transport on loopback: identities, RPC and data links over real sockets.

mod damage;
mod datalink;
mod identity;
mod line;
mod rpc;

use std::{net::SocketAddr, sync::Arc};

use relevo_transport::{ClusterCa, Identity, NodeKey};
use relevo_types::{ClusterId, NodeId, cluster::NodeKind};

/// A cluster that tests make nodes of.
struct Cluster {
    id: ClusterId,
    ca: ClusterCa,
}

impl Cluster {
    fn new(id: u8) -> Self {
        let id = ClusterId([id; 16]);
        Self {
            id,
            ca: ClusterCa::create(id).unwrap(),
        }
    }

    fn node(&self, node: u32) -> Arc<Identity> {
        let key = NodeKey::generate().unwrap();
        let certificate = self
            .ca
            .issue(&key.public_der(), NodeId(node), "test", NodeKind::Data)
            .unwrap();
        let ca = self.ca.certificate().clone();
        Arc::new(Identity::assemble(self.id, ca, certificate, &key).unwrap())
    }
}

/// Any port on loopback.
fn any() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A port on loopback where nobody listens.
fn nobody() -> SocketAddr {
    let listener = std::net::TcpListener::bind(any()).unwrap();
    listener.local_addr().unwrap()
}
