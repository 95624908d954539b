//! Virtual addresses whose lifetime the kernel ends by itself.
//!
//! Used by the address keeper of `agents`. An address is put on an interface with a valid lifetime
//! of [`LIFETIME`]; the keeper renews it several times within that. When the keeper is killed or
//! hangs, the kernel removes the address: no second machine is needed to take it away (DESIGN,
//! section 2).

use std::{net::IpAddr, time::Duration};

use crate::{
    HostError, Result,
    announce::{self, Announcement},
    netlink::{Link, Netlink},
};

/// How long an address lives without renewal. The kernel counts in whole seconds; it was seen to
/// remove such an address 1.0 to 1.3 s after the last renewal.
pub const LIFETIME: Duration = Duration::from_secs(1);

/// The longest that an address was seen to live after its last renewal.
pub const LIFETIME_BOUND: Duration = Duration::from_millis(1300);

/// A virtual address and the interface that carries it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VirtualAddress {
    /// The address.
    pub address: IpAddr,
    /// The prefix with which it is put on the interface. See [`find`].
    pub prefix: u8,
    /// The interface's number.
    pub index: u32,
    /// The interface's name, for messages.
    pub interface: String,
    mac: Vec<u8>,
}

/// Decides which interface shall carry `address`: `interface` when it is given, otherwise the one
/// that has another address of the network `address`/`prefix`.
///
/// When the interface has another address of the network, the virtual one is added as a host
/// address (/32, /128): as a second address of the network it would vanish with the first one.
///
/// # Errors
/// No interface fits, or it is down.
pub async fn find(
    netlink: &Netlink,
    address: IpAddr,
    prefix: u8,
    interface: Option<&str>,
) -> Result<VirtualAddress> {
    let width = if address.is_ipv4() { 32 } else { 128 };
    let what = || format!("cannot place the address {address}/{prefix}");
    if prefix > width {
        return Err(HostError::new(
            what(),
            format!("a prefix of this kind of address has at most {width} bits"),
            "correct the service's address part",
        ));
    }
    let links = netlink.links().await?;
    let addresses = netlink.addresses().await?;
    let in_network = |link: &Link| {
        addresses.iter().any(|other| {
            other.index == link.index
                && other.address != address
                && same_network(other.address, address, prefix)
        })
    };
    let link = match interface {
        Some(name) => netlink.link(name).await?,
        None => links
            .iter()
            .filter(|link| !link.loopback)
            .find(|link| in_network(link))
            // A virtual address on loopback addresses: the demo without root.
            .or_else(|| links.iter().find(|link| in_network(link)))
            .cloned()
            .ok_or_else(|| {
                HostError::new(
                    what(),
                    "no interface of this node has an address of that network",
                    "give the node an address there, or name the interface in the service's address part",
                )
            })?,
    };
    if !link.up {
        return Err(HostError::new(
            what(),
            format!("the interface {} is down", link.name),
            "set it up",
        ));
    }
    Ok(VirtualAddress {
        address,
        prefix: if in_network(&link) { width } else { prefix },
        index: link.index,
        interface: link.name,
        mac: link.mac,
    })
}

impl VirtualAddress {
    /// Puts the address on its interface for [`LIFETIME`], or renews that lifetime.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn put(&self, netlink: &Netlink) -> Result<()> {
        netlink
            .put_address(self.index, self.address, self.prefix, Some(LIFETIME))
            .await
    }

    /// Removes the address; says whether it was there.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn remove(&self, netlink: &Netlink) -> Result<bool> {
        netlink
            .remove_address(self.index, self.address, self.prefix)
            .await
    }

    /// Whether the interface has the address.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn is_present(&self, netlink: &Netlink) -> Result<bool> {
        Ok(netlink
            .addresses()
            .await?
            .iter()
            .any(|other| other.index == self.index && other.address == self.address))
    }

    /// What tells the neighbours that this machine has the address now; `None` for an interface
    /// without neighbours (loopback, tunnels).
    #[must_use]
    pub fn announcement(&self) -> Option<Announcement> {
        let mac: [u8; 6] = self.mac.as_slice().try_into().ok()?;
        (mac != [0; 6]).then_some(Announcement {
            address: self.address,
            index: self.index,
            mac,
        })
    }

    /// Asks the network whether another machine answers for the address (IPv4 only), for at most
    /// `patience`. Not part of a takeover, which may not wait: for `doctor` and tests.
    ///
    /// # Errors
    /// The kernel refused the packet socket.
    pub fn duplicate(&self, patience: Duration) -> Result<Option<[u8; 6]>> {
        match (self.announcement(), self.address) {
            (Some(announcement), IpAddr::V4(address)) => {
                announce::probe_duplicate(&announcement, address, patience)
            }
            _ => Ok(None),
        }
    }
}

/// Whether two addresses share the first `prefix` bits. Different kinds never do.
#[must_use]
pub fn same_network(a: IpAddr, b: IpAddr, prefix: u8) -> bool {
    let prefix = u32::from(prefix);
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let differing = u32::from(a) ^ u32::from(b);
            differing.leading_zeros() >= prefix.min(32)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let differing = u128::from(a) ^ u128::from(b);
            differing.leading_zeros() >= prefix.min(128)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_compared_by_their_prefix() {
        let at = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(same_network(at("10.1.2.3"), at("10.1.2.200"), 24));
        assert!(!same_network(at("10.1.2.3"), at("10.1.3.3"), 24));
        assert!(same_network(at("10.1.2.3"), at("11.1.2.3"), 0));
        assert!(!same_network(at("10.1.2.3"), at("10.1.2.2"), 32));
        assert!(same_network(at("fd00::1"), at("fd00::2:1"), 64));
        assert!(!same_network(at("fd00::1"), at("10.0.0.1"), 0));
    }
}
