//! The cluster's own certificate authority.

use std::fmt;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SubjectPublicKeyInfo,
};
use relevo_types::{ClusterId, NodeId, cluster::NodeKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Fingerprint, IdentityError, node_dns_name};

/// Certificates are valid in these years: from before any machine's reset clock, to after us.
const VALID_YEARS: (i32, i32) = (1980, 4000);

/// A node's private key, before and after it has a certificate.
pub struct NodeKey {
    pub(super) pair: KeyPair,
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeKey")
    }
}

impl NodeKey {
    /// A new key (ECDSA, P-256).
    ///
    /// # Errors
    /// No randomness.
    pub fn generate() -> Result<Self, IdentityError> {
        Ok(Self {
            pair: KeyPair::generate()?,
        })
    }

    /// The public half (DER, `SubjectPublicKeyInfo`): what a joining machine sends.
    #[must_use]
    pub fn public_der(&self) -> Vec<u8> {
        self.pair.subject_public_key_info()
    }

    pub(super) fn private_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pair.serialize_der()))
    }
}

/// The CA: issues the certificates of nodes. Held by every node that may admit others.
pub struct ClusterCa {
    cluster: ClusterId,
    certificate: CertificateDer<'static>,
    pub(super) key: KeyPair,
}

impl fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterCa({})", self.cluster)
    }
}

impl ClusterCa {
    /// A new CA for a new cluster.
    ///
    /// # Errors
    /// No randomness.
    pub fn create(cluster: ClusterId) -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name = DistinguishedName::new();
        // The id makes the names of two CAs differ, so that a certificate of another cluster is
        // told from one with a bad signature.
        params
            .distinguished_name
            .push(DnType::CommonName, format!("Relevo cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params);
        let certificate = params.self_signed(&key)?.der().clone();
        Ok(Self {
            cluster,
            certificate,
            key,
        })
    }

    /// A CA that was made before, as [`Self::to_parts`] gave it.
    ///
    /// # Errors
    /// The two are no certificate and key, or don't belong together.
    pub fn from_parts(
        cluster: ClusterId,
        certificate_der: Vec<u8>,
        key_pem: &str,
    ) -> Result<Self, IdentityError> {
        let malformed = |expected: &'static str, why: String| IdentityError::Malformed {
            what: "the CA of the cluster".to_owned(),
            expected,
            why,
        };
        let key = KeyPair::from_pem(key_pem)
            .map_err(|error| malformed("private key", error.to_string()))?;
        let ca = Self {
            cluster,
            certificate: CertificateDer::from(certificate_der),
            key,
        };
        // A certificate of the CA that the CA's certificate does not vouch for shows a wrong key.
        let probe = NodeKey::generate()?;
        let issued = ca.issue(&probe.public_der(), NodeId(0), "probe", NodeKind::Witness)?;
        super::verify::check_chain(&issued, &ca.certificate).map_err(|_| {
            malformed(
                "CA of this cluster",
                "the key does not belong to the certificate".to_owned(),
            )
        })?;
        Ok(ca)
    }

    /// Certificate (DER) and private key (PEM), to hand the CA to another node that may admit.
    #[must_use]
    pub fn to_parts(&self) -> (Vec<u8>, String) {
        (self.certificate.to_vec(), self.key.serialize_pem())
    }

    /// The cluster.
    #[must_use]
    pub const fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The CA's certificate, DER.
    #[must_use]
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What a token carries of this CA.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// Issues a certificate for a node's public key (DER, as [`NodeKey::public_der`] gives it).
    /// Name and kind are for people who look at the certificate; who the node is says its id.
    ///
    /// # Errors
    /// The bytes are no public key.
    pub fn issue(
        &self,
        public_der: &[u8],
        node: NodeId,
        name: &str,
        kind: NodeKind,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let public = SubjectPublicKeyInfo::from_der(public_der).map_err(|error| {
            IdentityError::Malformed {
                what: format!("the public key of node {node}"),
                expected: "public key",
                why: error.to_string(),
            }
        })?;
        let mut params = CertificateParams::new(vec![node_dns_name(node, self.cluster)])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params
            .distinguished_name
            .push(DnType::OrganizationalUnitName, kind.words());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params);
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        Ok(params.signed_by(&public, &issuer)?.der().clone())
    }
}

fn set_validity(params: &mut CertificateParams) {
    params.not_before = rcgen::date_time_ymd(VALID_YEARS.0, 1, 1);
    params.not_after = rcgen::date_time_ymd(VALID_YEARS.1, 1, 1);
}
