use std::{fs, os::unix::fs::PermissionsExt as _};

use relevo_transport::{ClusterCa, Identity, IdentityError, NodeKey, identity::peer_node};
use relevo_types::{ClusterId, NodeId, cluster::NodeKind};

use crate::Cluster;

#[test]
fn a_certificate_says_who_a_node_is() {
    let cluster = Cluster::new(1);
    let identity = cluster.node(3);
    assert_eq!(identity.node(), NodeId(3));
    assert_eq!(identity.cluster(), cluster.id);
    assert_eq!(identity.ca_fingerprint(), cluster.ca.fingerprint());
    let key = NodeKey::generate().unwrap();
    let certificate = cluster
        .ca
        .issue(&key.public_der(), NodeId(41), "x", NodeKind::Witness)
        .unwrap();
    assert_eq!(peer_node(&certificate, cluster.id).unwrap(), NodeId(41));
    let error = peer_node(&certificate, ClusterId([9; 16])).unwrap_err();
    assert!(matches!(error, IdentityError::NotAMember { .. }), "{error}");
    // The CA itself is no node.
    assert!(peer_node(cluster.ca.certificate(), cluster.id).is_err());
}

#[test]
fn a_certificate_of_another_ca_or_key_is_not_accepted() {
    let (ours, theirs) = (Cluster::new(1), Cluster::new(1));
    let key = NodeKey::generate().unwrap();
    let public = key.public_der();
    let certificate = theirs
        .ca
        .issue(&public, NodeId(1), "a", NodeKind::Data)
        .unwrap();
    let ca = ours.ca.certificate().clone();
    let error = Identity::assemble(ours.id, ca.clone(), certificate, &key).unwrap_err();
    assert!(matches!(error, IdentityError::Tls(_)), "{error}");
    let certificate = ours
        .ca
        .issue(&public, NodeId(1), "a", NodeKind::Data)
        .unwrap();
    let other = NodeKey::generate().unwrap();
    assert!(Identity::assemble(ours.id, ca, certificate, &other).is_err());
}

#[test]
fn files_keep_an_identity_and_only_its_owner_reads_the_keys() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("identity");
    let cluster = Cluster::new(1);
    let identity = cluster.node(2);
    identity.save(&dir).unwrap();
    assert!(ClusterCa::load(&dir, cluster.id).unwrap().is_none());
    cluster.ca.save(&dir).unwrap();

    let loaded = Identity::load(&dir, cluster.id).unwrap();
    assert_eq!(loaded.node(), NodeId(2));
    assert_eq!(loaded.ca_fingerprint(), identity.ca_fingerprint());
    let ca = ClusterCa::load(&dir, cluster.id).unwrap().unwrap();
    assert_eq!(ca.fingerprint(), cluster.ca.fingerprint());
    for name in ["ca.key", "node.key"] {
        let mode = fs::metadata(dir.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    // The loaded CA issues what the original vouches for.
    let key = NodeKey::generate().unwrap();
    let certificate = ca
        .issue(&key.public_der(), NodeId(9), "n", NodeKind::Data)
        .unwrap();
    let original = cluster.ca.certificate().clone();
    Identity::assemble(cluster.id, original, certificate, &key).unwrap();

    let error = Identity::load(&dir, ClusterId([8; 16])).unwrap_err();
    assert!(matches!(error, IdentityError::NotAMember { .. }), "{error}");
    fs::write(dir.join("node.crt"), "nonsense").unwrap();
    let error = Identity::load(&dir, cluster.id).unwrap_err().to_string();
    assert!(
        error.contains("node.crt is damaged or no certificate"),
        "{error}"
    );
    fs::remove_file(dir.join("node.key")).unwrap();
    let error = Identity::load(&dir, cluster.id).unwrap_err();
    assert!(matches!(error, IdentityError::File { .. }), "{error}");
}

#[test]
fn the_key_of_another_ca_is_noticed() {
    let (one, two) = (Cluster::new(1), Cluster::new(1));
    let (certificate, _) = one.ca.to_parts();
    let (_, key) = two.ca.to_parts();
    let error = ClusterCa::from_parts(one.id, certificate, &key).unwrap_err();
    assert!(error.to_string().contains("does not belong"), "{error}");
}

#[test]
fn what_is_no_public_key_gets_no_certificate() {
    let cluster = Cluster::new(1);
    let error = cluster
        .ca
        .issue(b"hello", NodeId(1), "a", NodeKind::Data)
        .unwrap_err();
    assert!(matches!(error, IdentityError::Malformed { .. }), "{error}");
}
