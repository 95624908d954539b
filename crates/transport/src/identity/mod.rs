//! Who a node is: a certificate of the cluster's CA that carries its id.
//!
//! The certificate of node 3 of a cluster is valid for the one name
//! `node-3.<cluster id>.relevo`. It does not expire: a cluster must not stop because nobody looked
//! at a calendar, or because a clock is wrong. A node that left is kept out by the control log
//! (the server refuses peers that are no members), not by its certificate.
//!
//! Owned by the server; the private key of a node is made on that node and never leaves it.

mod ca;
mod files;
mod verify;

use std::{fmt, str::FromStr as _, sync::Arc};

use relevo_types::{ClusterId, NodeId};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    crypto::{CryptoProvider, ring as provider},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
    version::TLS13,
};

pub use ca::{ClusterCa, NodeKey};
pub use verify::{describe_tls_error, peer_node};

/// The application protocol of the control port, negotiated by TLS.
const ALPN_RPC: &[u8] = b"relevo-rpc/1";

/// The application protocol of the data port. Its own version is negotiated by the greeting.
const ALPN_DATA: &[u8] = b"relevo-data";

/// AES-128-GCM first: with the processor's help it costs least, and data links carry everything
/// that is written.
static CIPHER_SUITES: &[SupportedCipherSuite] = &[
    provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
    provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
    provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// Why an identity can't be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file can't be read or written.
    #[error(
        "can't {what} {path}: {source}; the files of a node's identity are in its state directory"
    )]
    File {
        /// `read`, `write`.
        what: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A file or message does not hold what it should.
    #[error("{what} is damaged or no {expected}: {why}")]
    Malformed {
        /// What was read.
        what: String,
        /// What it should be.
        expected: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A certificate names no node of this cluster.
    #[error("the certificate is for `{found}`, no node of cluster {cluster}")]
    NotAMember {
        /// The name in it.
        found: String,
        /// The cluster.
        cluster: ClusterId,
    },
    /// The library refused.
    #[error("can't make keys or certificates: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS refused the key or certificate.
    #[error(
        "TLS refuses this node's certificate or key: {0}; if its files were changed, let the node join again"
    )]
    Tls(String),
}

/// SHA-256 of a CA certificate: how a joining machine knows that it talks to the right cluster.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node's certificate and key, and the CA that it trusts.
pub struct Identity {
    cluster: ClusterId,
    node: NodeId,
    ca: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} of {})", self.node, self.cluster)
    }
}

impl Identity {
    /// Puts together what the CA issued with the key that it was issued for. The node id and the
    /// cluster are those in the certificate.
    ///
    /// # Errors
    /// The certificate is not one of `cluster`, not issued by `ca`, or not for this key.
    pub fn assemble(
        cluster: ClusterId,
        ca: CertificateDer<'static>,
        certificate: CertificateDer<'static>,
        key: &NodeKey,
    ) -> Result<Self, IdentityError> {
        let identity = Self {
            cluster,
            node: peer_node(&certificate, cluster)?,
            ca,
            certificate,
            key: key.private_der(),
        };
        verify::check_chain(&identity.certificate, &identity.ca)
            .map_err(|error| IdentityError::Tls(error.to_string()))?;
        identity.client_config(Port::Control)?;
        Ok(identity)
    }

    /// The cluster.
    #[must_use]
    pub const fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// This node.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// The CA's certificate, DER.
    #[must_use]
    pub const fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// What a token carries so that a joining machine trusts this cluster only.
    #[must_use]
    pub fn ca_fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.ca)
    }

    /// TLS for dialing; shows this node's certificate, and expects one of this cluster.
    pub(crate) fn client_config(&self, port: Port) -> Result<Arc<ClientConfig>, IdentityError> {
        let mut config = client_builder()?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())
            .map_err(tls)?;
        config.alpn_protocols = vec![port.alpn().to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// TLS for listening. On the control port a client without a certificate is let in: it may
    /// only ask to join, and [`crate::rpc`] sees to that.
    pub(crate) fn server_config(&self, port: Port) -> Result<Arc<ServerConfig>, IdentityError> {
        let roots = Arc::new(self.roots()?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, crypto());
        let verifier = match port {
            Port::Control => verifier.allow_unauthenticated(),
            Port::Data => verifier,
        };
        let verifier = verifier
            .build()
            .map_err(|error| IdentityError::Tls(error.to_string()))?;
        // The CA's certificate is sent too: a joining machine knows only its fingerprint.
        let chain = vec![self.certificate.clone(), self.ca.clone()];
        let mut config = ServerConfig::builder_with_provider(crypto())
            .with_protocol_versions(&[&TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, self.key.clone_key())
            .map_err(tls)?;
        config.alpn_protocols = vec![port.alpn().to_vec()];
        // Connections live for days; there is nothing to resume.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn roots(&self) -> Result<RootCertStore, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(tls)?;
        Ok(roots)
    }
}

/// Which of a node's two TCP ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Port {
    Control,
    Data,
}

impl Port {
    const fn alpn(self) -> &'static [u8] {
        match self {
            Self::Control => ALPN_RPC,
            Self::Data => ALPN_DATA,
        }
    }
}

/// TLS for asking to join: no certificate of our own, and the CA pinned by its fingerprint.
pub(crate) fn joining_client_config(pin: Fingerprint) -> Result<Arc<ClientConfig>, IdentityError> {
    let verifier = Arc::new(verify::PinnedCa::new(pin, crypto()));
    let mut config = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_RPC.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

fn client_builder()
-> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, IdentityError> {
    ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)
}

fn crypto() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: CIPHER_SUITES.to_vec(),
        ..provider::default_provider()
    })
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "the shape that map_err wants"
)]
fn tls(error: rustls::Error) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

/// The name in a node's certificate.
pub(crate) fn node_dns_name(node: NodeId, cluster: ClusterId) -> String {
    format!("node-{}.{cluster}.relevo", node.0)
}

/// The name to expect from a node when dialing it.
pub(crate) fn server_name(node: NodeId, cluster: ClusterId) -> ServerName<'static> {
    let name = node_dns_name(node, cluster);
    // Digits, hex digits, letters, `-` and dots in labels shorter than 63: always a DNS name.
    ServerName::try_from(name).unwrap_or_else(|_| ServerName::from(std::net::Ipv4Addr::UNSPECIFIED))
}

/// Reads `node-<id>.<cluster>.relevo`.
fn parse_node_dns_name(name: &str, cluster: ClusterId) -> Option<NodeId> {
    let mut labels = name.split('.');
    let id = labels.next()?.strip_prefix("node-")?.parse().ok()?;
    let same = ClusterId::from_str(labels.next()?) == Ok(cluster);
    (same && labels.next() == Some("relevo") && labels.next().is_none()).then_some(NodeId(id))
}
