//! Paths: the networks of a node, and byte streams that carry heartbeats only.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{ClusterState, Node, NodeSpec, Ports, Rejection};
use crate::NodeId;

/// The most paths of a node: an operator who needs more has a typing error in a script. Each costs a
/// datagram to each member with every heartbeat.
pub const PATHS_MAX: usize = 8;

/// The longest name of a Unix socket that the kernel takes, in bytes (unix(7)).
const UNIX_PATH_MAX: usize = 107;

/// Slower lines can't carry a heartbeat within any dead time; faster ones than the second no driver sets.
const BAUD: std::ops::RangeInclusive<u32> = 1200..=4_000_000;

/// Bits that a byte takes on a serial line: start bit, eight data bits, stop bit.
const BITS_PER_BYTE: u32 = 10;

/// A node's address on one path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodePath {
    /// Name of the path, the same on every node that is on it.
    pub name: String,
    /// This node's address there.
    pub address: IpAddr,
    /// Replication prefers this path to others (a direct cable, say).
    pub replication: bool,
}

/// A node's end of a byte stream. It carries heartbeats and nothing else, and leads to one peer: the one other
/// node that has a stream of this name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StreamPath {
    /// Name of the path, the same on both ends.
    pub name: String,
    /// Where the stream is on this node.
    pub line: Line,
}

/// A byte stream on a node. As text `serial:/dev/ttyS0:115200` or `unix:/run/line.sock`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Line {
    /// A serial device, 8 data bits, no parity, no flow control.
    Serial {
        /// The device, absolute.
        device: PathBuf,
        /// Its speed in bits a second, the same on both ends.
        baud: u32,
    },
    /// A Unix stream socket: whoever is first listens, the other one connects. Also for what carries bytes
    /// between machines in another way and has a socket on each.
    Unix(PathBuf),
}

/// Where a path is on a node: an IP address, or a byte stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PathAddress {
    /// Carries everything.
    Ip(IpAddr),
    /// Carries heartbeats.
    Line(Line),
}

impl Line {
    /// How many bytes it carries in a second; `None`: no bound is known.
    #[must_use]
    pub const fn bytes_per_second(&self) -> Option<u32> {
        match self {
            Self::Serial { baud, .. } => Some(*baud / BITS_PER_BYTE),
            Self::Unix(_) => None,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serial { device, baud } => write!(f, "serial:{}:{baud}", device.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let absolute = |path: &str| {
            let path = PathBuf::from(path);
            if path.is_absolute() {
                Ok(path)
            } else {
                Err(format!("`{}` does not begin with /", path.display()))
            }
        };
        if let Some(path) = text.strip_prefix("unix:") {
            if path.len() > UNIX_PATH_MAX {
                return Err(format!(
                    "the name of a Unix socket has at most {UNIX_PATH_MAX} bytes"
                ));
            }
            return absolute(path).map(Self::Unix);
        }
        let rest = text.strip_prefix("serial:").ok_or_else(|| {
            format!("`{text}` is no stream: write serial:DEVICE:BAUD or unix:PATH")
        })?;
        let (device, baud) = rest.rsplit_once(':').ok_or_else(|| {
            format!("`{text}` has no speed: write for example serial:/dev/ttyS0:115200")
        })?;
        let baud = baud
            .parse()
            .ok()
            .filter(|baud| BAUD.contains(baud))
            .ok_or_else(|| {
                format!(
                    "`{baud}` is no speed of a serial line: {} to {} bits a second",
                    BAUD.start(),
                    BAUD.end()
                )
            })?;
        let device = absolute(device)?;
        Ok(Self::Serial { device, baud })
    }
}

impl fmt::Display for PathAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => write!(f, "{address}"),
            Self::Line(line) => write!(f, "{line}"),
        }
    }
}

impl FromStr for PathAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("serial:") || text.starts_with("unix:") {
            return text.parse().map(Self::Line);
        }
        text.parse()
            .map(Self::Ip)
            .map_err(|_| format!("`{text}` is no IP address, serial:DEVICE:BAUD or unix:PATH"))
    }
}

impl TryFrom<String> for Line {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Line> for String {
    fn from(line: Line) -> Self {
        line.to_string()
    }
}

impl TryFrom<String> for PathAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<PathAddress> for String {
    fn from(address: PathAddress) -> Self {
        address.to_string()
    }
}

impl NodeSpec {
    /// Every path of the node by name, with where it is: networks first.
    pub fn all_paths(&self) -> impl Iterator<Item = (&str, PathAddress)> {
        let networks = self.paths.iter();
        let networks = networks.map(|path| (path.name.as_str(), PathAddress::Ip(path.address)));
        let streams = self.streams.iter();
        let streams =
            streams.map(|path| (path.name.as_str(), PathAddress::Line(path.line.clone())));
        networks.chain(streams)
    }

    /// Where the path of that name is.
    #[must_use]
    pub fn path(&self, name: &str) -> Option<PathAddress> {
        let mut paths = self.all_paths();
        paths.find(|(own, _)| *own == name).map(|(_, path)| path)
    }

    /// Puts a path at the end of the list it belongs to. `replication` means nothing to a stream.
    pub fn push_path(&mut self, name: &str, address: &PathAddress, replication: bool) {
        let name = name.to_owned();
        match address {
            PathAddress::Ip(address) => self.paths.push(NodePath {
                name,
                address: *address,
                replication,
            }),
            PathAddress::Line(line) => self.streams.push(StreamPath {
                name,
                line: line.clone(),
            }),
        }
    }

    /// Whether the other node is on the network of one of this one's paths.
    #[must_use]
    pub fn shares_network(&self, other: &Self) -> bool {
        let names: Vec<&str> = other.paths.iter().map(|path| path.name.as_str()).collect();
        self.paths
            .iter()
            .any(|path| names.contains(&path.name.as_str()))
    }
}

impl Node {
    /// Where its control port is, on every network.
    pub fn control_addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.spec
            .paths
            .iter()
            .map(|path| SocketAddr::new(path.address, self.spec.ports.control))
    }

    /// Where its data port is: first the networks that `from` is on too, and among these the preferred
    /// ones.
    #[must_use]
    pub fn data_addresses(&self, from: &NodeSpec) -> Vec<SocketAddr> {
        let shared = |path: &NodePath| from.paths.iter().any(|own| own.name == path.name);
        let mut paths: Vec<&NodePath> = self.spec.paths.iter().collect();
        paths.sort_by_key(|path| (!shared(path), !path.replication));
        paths
            .into_iter()
            .map(|path| SocketAddr::new(path.address, self.spec.ports.data))
            .collect()
    }
}

impl ClusterState {
    /// Whether a machine may join with these paths, beside those of the members.
    ///
    /// # Errors
    /// What stands against it and what to do.
    pub fn check_paths(&self, spec: &NodeSpec) -> Result<(), Rejection> {
        let mut checked = NodeSpec {
            paths: Vec::new(),
            streams: Vec::new(),
            ..spec.clone()
        };
        if spec.paths.is_empty() {
            return Err(bad(
                "a node needs an IP address, and a stream carries heartbeats only; give one more path with NAME=IP",
            ));
        }
        for (name, address) in spec.all_paths() {
            self.check_path(None, &checked, name, &address, false)?;
            checked.push_path(name, &address, false);
        }
        Ok(())
    }

    /// Whether one more path fits a node (`None`: one that is no member yet) and the others.
    pub(super) fn check_path(
        &self,
        node: Option<NodeId>,
        spec: &NodeSpec,
        name: &str,
        address: &PathAddress,
        replication: bool,
    ) -> Result<(), Rejection> {
        super::apply::check_name(name)?;
        let own = &spec.name;
        if let Some(known) = spec.path(name) {
            return Err(bad(format!(
                "node {own} has a path `{name}` already ({known}); choose another name, or remove that one first"
            )));
        }
        if spec.all_paths().count() >= PATHS_MAX {
            return Err(bad(format!(
                "node {own} has {PATHS_MAX} paths, the most there can be; remove one first"
            )));
        }
        if let Some((known, _)) = spec.all_paths().find(|(_, known)| same(known, address)) {
            return Err(bad(format!(
                "{address} is on node {own}'s path `{known}` already; a second path over the same way protects from nothing, give another one"
            )));
        }
        let others: Vec<&Node> = self
            .nodes
            .values()
            .filter(|other| Some(other.id) != node)
            .collect();
        match address {
            PathAddress::Ip(ip) => check_network(&others, spec.ports, name, *ip),
            PathAddress::Line(_) if replication => Err(bad(format!(
                "path `{name}` is a stream, which carries heartbeats only; leave `,replication` away"
            ))),
            PathAddress::Line(line) => check_stream(&others, name, line),
        }
    }
}

fn bad(why: impl Into<String>) -> Rejection {
    Rejection::BadPath { why: why.into() }
}

/// Two ways that are one.
fn same(one: &PathAddress, other: &PathAddress) -> bool {
    match (one, other) {
        // Whatever its speed.
        (
            PathAddress::Line(Line::Serial { device: one, .. }),
            PathAddress::Line(Line::Serial { device: other, .. }),
        ) => one == other,
        _ => one == other,
    }
}

fn check_network(
    others: &[&Node],
    ports: Ports,
    name: &str,
    address: IpAddr,
) -> Result<(), Rejection> {
    let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    if link_local {
        return Err(bad(format!(
            "{address} means something only together with an interface; give the interface a unique local address (fd00::/8) or a global one"
        )));
    }
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || broadcast {
        return Err(bad(format!(
            "{address} is no address of one machine; give the one that the node has on this network"
        )));
    }
    for other in others {
        let theirs = other
            .spec
            .paths
            .iter()
            .find(|path| path.address == address && ports.overlap(other.spec.ports));
        if let Some(path) = theirs {
            return Err(bad(format!(
                "{address} is node {}'s address on path `{}`; give an address of its own",
                other.spec.name, path.name
            )));
        }
        match other.spec.path(name) {
            Some(PathAddress::Line(line)) => {
                return Err(bad(format!(
                    "path `{name}` is a stream on node {} ({line}), and paths of two nodes belong together by name; choose another name",
                    other.spec.name
                )));
            }
            Some(PathAddress::Ip(theirs)) if theirs.is_ipv6() != address.is_ipv6() => {
                return Err(bad(format!(
                    "{address} can't reach {theirs}, node {}'s address on path `{name}`: one is IPv4, the other IPv6; give an address of the same kind, or choose another name",
                    other.spec.name
                )));
            }
            Some(PathAddress::Ip(_)) | None => {}
        }
    }
    Ok(())
}

fn check_stream(others: &[&Node], name: &str, line: &Line) -> Result<(), Rejection> {
    let ends: Vec<(&str, PathAddress)> = others
        .iter()
        .filter_map(|other| Some((other.spec.name.as_str(), other.spec.path(name)?)))
        .collect();
    match ends.as_slice() {
        [] => Ok(()),
        [(node, PathAddress::Ip(address)), ..] => Err(bad(format!(
            "path `{name}` is a network on node {node} ({address}), and paths of two nodes belong together by name; choose another name"
        ))),
        [(node, PathAddress::Line(Line::Serial { baud, .. }))] => match line {
            Line::Serial { baud: own, .. } if own != baud => Err(bad(format!(
                "the line has {baud} bits a second on node {node} and {own} here; give both ends the same speed"
            ))),
            Line::Serial { .. } | Line::Unix(_) => Ok(()),
        },
        [(_, PathAddress::Line(Line::Unix(_)))] => Ok(()),
        [(one, _), (other, _), ..] => Err(bad(format!(
            "the stream `{name}` leads from node {one} to node {other}, and a stream has two ends; choose another name"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for text in [
            "10.0.0.1",
            "fd00::7",
            "serial:/dev/ttyS0:115200",
            "serial:/dev/serial/by-id/usb-x:1-port0:9600",
            "unix:/run/relevo/line.sock",
        ] {
            let address: PathAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<PathAddress>(&json).unwrap(), address);
        }
        let slow: Line = "serial:/dev/ttyS0:9600".parse().unwrap();
        assert_eq!(slow.bytes_per_second(), Some(960));
        for (text, word) in [
            ("serial:/dev/ttyS0", "no speed"),
            ("serial:ttyS0:9600", "begin with /"),
            ("serial:/dev/ttyS0:fast", "`fast`"),
            ("serial:/dev/ttyS0:300", "1200"),
            ("unix:line.sock", "begin with /"),
            ("host", "no IP address"),
        ] {
            let error = text.parse::<PathAddress>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        let long = format!("unix:/{}", "x".repeat(UNIX_PATH_MAX));
        assert!(long.parse::<PathAddress>().unwrap_err().contains("107"));
    }
}
