//! Networks between namespaces: a hub with a bridge for each network, and a cable to each machine
//! that can be pulled.
//!
//! Used by `demo` and by tests. Everything vanishes with the last clone of the hub.

use std::net::IpAddr;

use crate::{Result, netns::NetNs};

/// A namespace of bridges.
#[derive(Clone, Debug)]
pub struct Hub {
    namespace: NetNs,
}

impl Hub {
    /// A hub with a bridge of each name.
    ///
    /// # Errors
    /// The kernel refuses: no rights, or a limit.
    pub fn new(networks: &[&str]) -> Result<Self> {
        let namespace = NetNs::new("hub")?;
        for network in networks {
            namespace.add_bridge(network)?;
        }
        Ok(Self { namespace })
    }

    /// Puts a cable from a machine into the bridge of a network. At the machine its end has the
    /// network's name and the address, in a network of 24 bits, or of 64 with IPv6.
    ///
    /// # Errors
    /// `machine` and `network` are longer than 14 bytes together, there is a cable between them, or
    /// the kernel refuses.
    pub fn plug(
        &self,
        machine: &str,
        namespace: &NetNs,
        network: &str,
        address: IpAddr,
    ) -> Result<()> {
        let port = port(machine, network);
        self.namespace.add_cable(&port, namespace, network)?;
        self.namespace.add_port(network, &port)?;
        let prefix = if address.is_ipv6() { 64 } else { 24 };
        namespace.add_address(network, address, prefix)
    }

    /// Pulls a cable, or plugs it in again. Both ends lose their carrier.
    ///
    /// # Errors
    /// There is no such cable, or the kernel refuses.
    pub fn set_cable(&self, machine: &str, network: &str, up: bool) -> Result<()> {
        self.namespace.set_up(&port(machine, network), up)
    }
}

/// The hub's end of a cable; the kernel allows 15 bytes.
fn port(machine: &str, network: &str) -> String {
    format!("{machine}-{network}")
}
