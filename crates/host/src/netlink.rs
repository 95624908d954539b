//! The kernel's network configuration, by rtnetlink.
//!
//! Used by [`crate::address`] and [`crate::netns`]. The only file that knows the netlink library,
//! whose interface changes every few months. A [`Netlink`] speaks to the network namespace that
//! its thread was in when it was opened, whatever thread uses it later.

use std::{
    fmt,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
    time::Duration,
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, CacheInfo},
        link::{InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute},
    },
};

use crate::{HostError, Result};

/// `INFINITY_LIFE_TIME` of the kernel: an address that does not expire.
const FOREVER_S: u32 = u32::MAX;

/// A conversation with the kernel. Must be opened and used inside a tokio runtime.
pub struct Netlink {
    handle: Handle,
    pump: tokio::task::JoinHandle<()>,
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// The kernel's number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Hardware address; empty when it has none.
    pub mac: Vec<u8>,
    /// The administrator set it up.
    pub up: bool,
    /// It has a carrier: the cable is plugged in at both ends.
    pub running: bool,
    /// It is the loopback interface.
    pub loopback: bool,
}

/// An address of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InterfaceAddress {
    /// Its interface.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix.
    pub prefix: u8,
    /// What is left of its lifetime, in whole seconds; `None`: it does not expire.
    pub valid: Option<Duration>,
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").finish_non_exhaustive()
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Netlink {
    /// Opens a conversation about the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel gives no netlink socket.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| {
            HostError::io(
                "cannot open a netlink socket",
                error,
                "check that the kernel has netlink and that file descriptors are left",
            )
        })?;
        Ok(Self {
            handle,
            pump: tokio::spawn(connection),
        })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn links(&self) -> Result<Vec<Link>> {
        self.handle
            .link()
            .get()
            .execute()
            .map_ok(|message| link_of(&message))
            .try_collect()
            .await
            .map_err(|error| refused("cannot list the network interfaces", error))
    }

    /// The interface of that name.
    ///
    /// # Errors
    /// There is none.
    pub async fn link(&self, name: &str) -> Result<Link> {
        let links = self.links().await?;
        let names: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
        let list = names.join(", ");
        links
            .iter()
            .find(|link| link.name == name)
            .cloned()
            .ok_or_else(|| {
                HostError::new(
                    format!("cannot use interface {name}"),
                    "it does not exist here",
                    format!("use one of: {list}"),
                )
            })
    }

    /// All addresses of all interfaces.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn addresses(&self) -> Result<Vec<InterfaceAddress>> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("cannot list the network addresses", error))?;
        Ok(messages.iter().filter_map(address_of).collect())
    }

    /// Adds the address, or renews its lifetime when the interface has it. `lifetime` counts from
    /// now in whole seconds (rounded up); `None`: it does not expire. IPv6 is usable at once, without
    /// duplicate address detection: whoever takes a virtual address has the right to it.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn put_address(
        &self,
        index: u32,
        address: IpAddr,
        prefix: u8,
        lifetime: Option<Duration>,
    ) -> Result<()> {
        let mut request = self.handle.address().add(index, address, prefix).replace();
        let message = request.message_mut();
        if let Some(lifetime) = lifetime {
            let mut cache = CacheInfo::default();
            let seconds = u32::try_from(lifetime.as_millis().div_ceil(1000)).unwrap_or(FOREVER_S);
            cache.ifa_valid = seconds.max(1);
            cache.ifa_preferred = cache.ifa_valid;
            message.attributes.push(AddressAttribute::CacheInfo(cache));
        }
        if address.is_ipv6() {
            message.header.flags |= AddressHeaderFlags::Nodad;
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.map_err(|error| {
            refused(
                &format!("cannot put {address}/{prefix} on interface number {index}"),
                error,
            )
        })
    }

    /// Removes the address; says whether it was there.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn remove_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<bool> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = prefix;
        message.header.family = match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes.push(AddressAttribute::Address(address));
        message.attributes.push(AddressAttribute::Local(address));
        match self.handle.address().del(message).execute().await {
            Ok(()) => Ok(true),
            Err(error) if matches!(errno_of(&error), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => {
                Ok(false)
            }
            Err(error) => Err(refused(
                &format!("cannot remove {address}/{prefix} from interface number {index}"),
                error,
            )),
        }
    }

    /// Sets an interface up or down.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn set_up(&self, index: u32, up: bool) -> Result<()> {
        let link = LinkUnspec::new_with_index(index);
        let message = if up { link.up() } else { link.down() }.build();
        self.change(
            message,
            &format!("cannot set interface number {index} up or down"),
        )
        .await
    }

    /// Makes a pair of interfaces joined by a cable: `name` here, `peer` in the namespace behind
    /// `peer_namespace`. Both are down.
    ///
    /// # Errors
    /// A name is in use, or the kernel refused.
    pub async fn add_veth(
        &self,
        name: &str,
        peer: &str,
        peer_namespace: BorrowedFd<'_>,
    ) -> Result<()> {
        let far_end = LinkMessageBuilder::<LinkUnspec>::default()
            .name(peer.to_owned())
            .setns_by_fd(peer_namespace.as_raw_fd())
            .build();
        let message = LinkVeth::new(name, peer)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far_end)))
            .build();
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(|error| refused(&format!("cannot make the cable {name} - {peer}"), error))
    }

    /// Makes a bridge. It forwards multicast to every port: there is no querier to ask for it.
    ///
    /// # Errors
    /// The name is in use, or the kernel refused.
    pub async fn add_bridge(&self, name: &str) -> Result<()> {
        let message = LinkBridge::new(name).mcast_snooping(false).build();
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(|error| refused(&format!("cannot make the bridge {name}"), error))
    }

    /// Makes an interface a port of a bridge.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn set_bridge(&self, port: u32, bridge: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(port).controller(bridge).build();
        self.change(
            message,
            &format!("cannot make interface number {port} a port of bridge number {bridge}"),
        )
        .await
    }

    /// Isolated ports of a bridge reach only its other ports.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn set_isolated(&self, port: u32, isolated: bool) -> Result<()> {
        self.handle
            .link()
            .set_port(LinkBridgePort::new(port).isolated(isolated).build())
            .execute()
            .await
            .map_err(|error| {
                refused(
                    &format!("cannot isolate or join bridge port number {port}"),
                    error,
                )
            })
    }

    /// Removes an interface; the other end of a cable goes with it.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn remove_link(&self, index: u32) -> Result<()> {
        self.handle
            .link()
            .del(index)
            .execute()
            .await
            .map_err(|error| refused(&format!("cannot remove interface number {index}"), error))
    }

    /// The hardware address that this kernel believes the neighbour `address` to have.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn neighbour(&self, address: IpAddr) -> Result<Option<Vec<u8>>> {
        let wanted = match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        };
        let entries: Vec<_> = self
            .handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("cannot list the neighbours", error))?;
        let found = entries.into_iter().find(|entry| {
            entry
                .attributes
                .contains(&NeighbourAttribute::Destination(wanted.clone()))
        });
        Ok(found.and_then(|entry| {
            entry
                .attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    NeighbourAttribute::LinkLayerAddress(mac) => Some(mac),
                    _ => None,
                })
        }))
    }

    async fn change(&self, message: LinkMessage, what: &str) -> Result<()> {
        self.handle
            .link()
            .change(message)
            .execute()
            .await
            .map_err(|error| refused(what, error))
    }
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Vec::new(),
        up: message.header.flags.contains(LinkFlags::Up),
        running: message.header.flags.contains(LinkFlags::LowerUp),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            _ => {}
        }
    }
    link
}

fn address_of(message: &AddressMessage) -> Option<InterfaceAddress> {
    let mut plain = None;
    let mut local = None;
    let mut valid = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(address) => plain = Some(*address),
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::CacheInfo(cache) if cache.ifa_valid != FOREVER_S => {
                valid = Some(Duration::from_secs(u64::from(cache.ifa_valid)));
            }
            _ => {}
        }
    }
    Some(InterfaceAddress {
        index: message.header.index,
        // On a point-to-point link IFA_ADDRESS is the far end, IFA_LOCAL ours.
        address: local.or(plain)?,
        prefix: message.header.prefix_len,
        valid,
    })
}

fn errno_of(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}

fn refused(what: &str, error: rtnetlink::Error) -> HostError {
    let next = "run as root or with CAP_NET_ADMIN, and check that the interface still exists";
    match errno_of(&error) {
        Some(errno) => HostError::io(what, std::io::Error::from_raw_os_error(errno), next),
        None => HostError::new(what, error, next),
    }
}
