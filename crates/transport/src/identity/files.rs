//! The identity in a directory: `ca.crt`, `node.crt`, `node.key`, and `ca.key` on a node that may
//! admit others. Keys are readable by their owner only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use rcgen::KeyPair;
use relevo_types::ClusterId;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::{ClusterCa, Identity, IdentityError, NodeKey};

const CA_CERTIFICATE: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const NODE_CERTIFICATE: &str = "node.crt";
const NODE_KEY: &str = "node.key";

impl Identity {
    /// Writes the identity into a directory (made if missing), key first: a directory with a
    /// certificate is complete.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        let key = pem("PRIVATE KEY", self.key.secret_der());
        write_private(dir, NODE_KEY, &key)?;
        write_private(dir, CA_CERTIFICATE, &pem("CERTIFICATE", &self.ca))?;
        write_private(
            dir,
            NODE_CERTIFICATE,
            &pem("CERTIFICATE", &self.certificate),
        )
    }

    /// Reads the identity from a directory.
    ///
    /// # Errors
    /// A file is missing or damaged, or is of another cluster.
    pub fn load(dir: &Path, cluster: ClusterId) -> Result<Self, IdentityError> {
        let key = NodeKey {
            pair: read_key(dir, NODE_KEY)?,
        };
        let ca = read_certificate(dir, CA_CERTIFICATE)?;
        Self::assemble(cluster, ca, read_certificate(dir, NODE_CERTIFICATE)?, &key)
    }
}

impl ClusterCa {
    /// Writes the CA into a directory (made if missing).
    ///
    /// # Errors
    /// A file can't be written.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        write_private(dir, CA_KEY, &self.key.serialize_pem())?;
        write_private(dir, CA_CERTIFICATE, &pem("CERTIFICATE", self.certificate()))
    }

    /// Reads the CA from a directory; `None` when this node does not hold its key.
    ///
    /// # Errors
    /// A file can't be read, is damaged, or the two don't belong together.
    pub fn load(dir: &Path, cluster: ClusterId) -> Result<Option<Self>, IdentityError> {
        let path = dir.join(CA_KEY);
        match fs::read_to_string(&path) {
            Ok(key) => {
                let certificate = read_certificate(dir, CA_CERTIFICATE)?;
                Self::from_parts(cluster, certificate.to_vec(), &key).map(Some)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(IdentityError::File {
                what: "read",
                path,
                source,
            }),
        }
    }
}

fn read_key(dir: &Path, name: &str) -> Result<KeyPair, IdentityError> {
    let path = dir.join(name);
    let text = fs::read_to_string(&path).map_err(|source| IdentityError::File {
        what: "read",
        path: path.clone(),
        source,
    })?;
    KeyPair::from_pem(&text).map_err(|error| IdentityError::Malformed {
        what: path.display().to_string(),
        expected: "private key",
        why: error.to_string(),
    })
}

fn read_certificate(dir: &Path, name: &str) -> Result<CertificateDer<'static>, IdentityError> {
    let path = dir.join(name);
    let text = fs::read(&path).map_err(|source| IdentityError::File {
        what: "read",
        path: path.clone(),
        source,
    })?;
    CertificateDer::from_pem_slice(&text).map_err(|error| IdentityError::Malformed {
        what: path.display().to_string(),
        expected: "certificate",
        why: error.to_string(),
    })
}

/// Writes a file that only its owner can read, all or nothing.
fn write_private(dir: &Path, name: &str, text: &str) -> Result<(), IdentityError> {
    let path = dir.join(name);
    let write = || -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        let temporary = dir.join(format!("{name}.new"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|source| IdentityError::File {
        what: "write",
        path: path.clone(),
        source,
    })
}

/// PEM (RFC 7468) of some DER.
fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut body = String::with_capacity(der.len() * 3 / 2 + 64);
    let mut column = 0;
    for group in der.chunks(3) {
        let bits = group
            .iter()
            .chain([0, 0].iter())
            .take(3)
            .fold(0usize, |bits, byte| bits << 8 | usize::from(*byte));
        for place in 0..4 {
            let digit = ALPHABET[bits >> (18 - 6 * place) & 63];
            body.push(if place <= group.len() {
                char::from(digit)
            } else {
                '='
            });
        }
        column += 4;
        if column == 64 {
            body.push('\n');
            column = 0;
        }
    }
    if column != 0 {
        body.push('\n');
    }
    format!("-----BEGIN {label}-----\n{body}-----END {label}-----\n")
}
