//! Checking certificates, and saying what is wrong with them.

use std::sync::Arc;

use relevo_types::{ClusterId, NodeId};
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, Error, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use webpki::EndEntityCert;

use super::{Fingerprint, IdentityError, parse_node_dns_name};

/// The node that a certificate, already verified by TLS, belongs to.
///
/// # Errors
/// It names no node of the cluster.
pub fn peer_node(
    certificate: &CertificateDer<'_>,
    cluster: ClusterId,
) -> Result<NodeId, IdentityError> {
    let parsed =
        EndEntityCert::try_from(certificate).map_err(|error| IdentityError::Malformed {
            what: "a certificate".to_owned(),
            expected: "certificate",
            why: error.to_string(),
        })?;
    let mut names = parsed.valid_dns_names();
    let (first, more) = (names.next(), names.next());
    // Exactly one name: a certificate that speaks for two nodes speaks for none.
    first
        .filter(|_| more.is_none())
        .and_then(|name| parse_node_dns_name(name, cluster))
        .ok_or_else(|| IdentityError::NotAMember {
            found: first.unwrap_or("nobody").to_owned(),
            cluster,
        })
}

/// Whether the CA issued the certificate.
pub(super) fn check_chain(
    certificate: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
) -> Result<(), Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned())?;
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(certificate)?,
        &roots,
        &[],
        UnixTime::now(),
        super::crypto().signature_verification_algorithms.all,
    )
}

/// Accepts any node of the one cluster whose CA has a given fingerprint: all that a joining
/// machine knows.
#[derive(Debug)]
pub(super) struct PinnedCa {
    pin: Fingerprint,
    crypto: Arc<CryptoProvider>,
}

impl PinnedCa {
    pub(super) const fn new(pin: Fingerprint, crypto: Arc<CryptoProvider>) -> Self {
        Self { pin, crypto }
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = intermediates
            .iter()
            .find(|certificate| Fingerprint::of(certificate) == self.pin)
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        check_chain(end_entity, ca)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.crypto.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.crypto.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.crypto
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// What an error of a TLS connection means between nodes, in words.
#[must_use]
pub fn describe_tls_error(error: &std::io::Error) -> String {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>());
    let Some(tls) = inner else {
        return error.to_string();
    };
    let meaning = match tls {
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => {
            "its certificate is of another cluster; check the address, or the token it joined with"
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => {
            "another node of the cluster answers at that address; check the addresses of the paths"
        }
        Error::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError
            | AlertDescription::CertificateUnknown,
        ) => "it refused this node's certificate: it belongs to another cluster",
        Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "it wants a certificate; this machine has not joined the cluster"
        }
        Error::AlertReceived(AlertDescription::NoApplicationProtocol)
        | Error::NoApplicationProtocol => {
            "it is another port of Relevo, or another version; check ports and versions"
        }
        Error::InvalidMessage(_) => "it does not speak TLS; is it Relevo's port?",
        _ => return tls.to_string(),
    };
    format!("{meaning} ({tls})")
}
