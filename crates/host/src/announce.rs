//! Telling neighbours where an address is now: gratuitous ARP and unsolicited neighbour
//! advertisements, sent as raw packets.
//!
//! Called by the address keeper of `agents` after a takeover. One packet is not enough: the killed
//! owner's kernel may still answer for the address until its lifetime ends, switches drop, and some
//! neighbours heed only one of the two ARP forms. So both forms, in bursts at [`BURSTS`].

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use crate::{HostError, Result, clock};

/// When an address is announced, counted from the takeover. The last one comes after the longest
/// time that a killed owner's kernel may still hold the address.
pub const BURSTS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(5),
];

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const BROADCAST: [u8; 6] = [0xff; 6];
/// The Ethernet address of ff02::1, all nodes of the link (RFC 2464, section 7).
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;

/// Who has which address, for the neighbours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Announcement {
    /// The address.
    pub address: IpAddr,
    /// Number of the interface that carries it.
    pub index: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
}

impl Announcement {
    /// Sends one round: for IPv4 the request and the reply form of gratuitous ARP, for IPv6 an
    /// unsolicited neighbour advertisement. Returns at once.
    ///
    /// # Errors
    /// The kernel refused the packet socket or the packet.
    pub fn send(&self) -> Result<()> {
        let refused = |error: io::Error| {
            HostError::io(
                format!("cannot announce {} to the neighbours", self.address),
                error,
                "run as root or with CAP_NET_RAW, and check that the interface is up",
            )
        };
        match self.address {
            IpAddr::V4(address) => {
                let socket = packet_socket(ETHERTYPE_ARP).map_err(refused)?;
                for operation in [ARP_REQUEST, ARP_REPLY] {
                    let packet = arp(operation, self.mac, address, BROADCAST, address);
                    send_packet(&socket, self.index, ETHERTYPE_ARP, BROADCAST, &packet)
                        .map_err(refused)?;
                }
            }
            IpAddr::V6(address) => {
                let socket = packet_socket(ETHERTYPE_IPV6).map_err(refused)?;
                let packet = neighbour_advertisement(self.mac, address);
                send_packet(&socket, self.index, ETHERTYPE_IPV6, ALL_NODES, &packet)
                    .map_err(refused)?;
            }
        }
        Ok(())
    }
}

/// Asks who has `address` (an ARP probe, RFC 5227) and waits for at most `patience` for an answer
/// of another machine.
pub(crate) fn probe_duplicate(
    from: &Announcement,
    address: Ipv4Addr,
    patience: Duration,
) -> Result<Option<[u8; 6]>> {
    let refused = |error: io::Error| {
        HostError::io(
            format!("cannot ask the network who has {address}"),
            error,
            "run as root or with CAP_NET_RAW, and check that the interface is up",
        )
    };
    let socket = packet_socket(ETHERTYPE_ARP).map_err(refused)?;
    bind_packet_socket(&socket, from.index, ETHERTYPE_ARP).map_err(refused)?;
    let probe = arp(
        ARP_REQUEST,
        from.mac,
        Ipv4Addr::UNSPECIFIED,
        [0; 6],
        address,
    );
    send_packet(&socket, from.index, ETHERTYPE_ARP, BROADCAST, &probe).map_err(refused)?;
    let deadline = clock::now() + patience;
    let mut packet = [0u8; 64];
    loop {
        let left = deadline.since(clock::now());
        if left.is_zero() {
            return Ok(None);
        }
        let Some(length) = receive_within(&socket, &mut packet, left).map_err(refused)? else {
            return Ok(None);
        };
        if let Some(mac) = arp_sender(&packet[..length], address)
            && mac != from.mac
        {
            return Ok(Some(mac));
        }
    }
}

/// An ARP packet for IPv4 over Ethernet (RFC 826).
fn arp(
    operation: u16,
    sender_mac: [u8; 6],
    sender: Ipv4Addr,
    target_mac: [u8; 6],
    target: Ipv4Addr,
) -> [u8; 28] {
    let mut packet = [0; 28];
    packet[0..2].copy_from_slice(&1u16.to_be_bytes()); // Ethernet
    packet[2..4].copy_from_slice(&0x0800u16.to_be_bytes()); // IPv4
    packet[4] = 6;
    packet[5] = 4;
    packet[6..8].copy_from_slice(&operation.to_be_bytes());
    packet[8..14].copy_from_slice(&sender_mac);
    packet[14..18].copy_from_slice(&sender.octets());
    packet[18..24].copy_from_slice(&target_mac);
    packet[24..28].copy_from_slice(&target.octets());
    packet
}

/// The sender's hardware address, when an ARP packet says that its sender has `address`.
fn arp_sender(packet: &[u8], address: Ipv4Addr) -> Option<[u8; 6]> {
    if packet.len() < 28 || packet[4] != 6 || packet[5] != 4 || packet[14..18] != address.octets() {
        return None;
    }
    packet[8..14].try_into().ok()
}

/// A whole IPv6 packet with an unsolicited neighbour advertisement for `address` to all nodes of
/// the link, override flag set (RFC 4861, sections 4.4 and 7.2.6).
fn neighbour_advertisement(mac: [u8; 6], address: Ipv6Addr) -> [u8; 72] {
    const ICMPV6: u8 = 58;
    const BODY: u16 = 32;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut packet = [0; 72];
    packet[0] = 6 << 4;
    packet[4..6].copy_from_slice(&BODY.to_be_bytes());
    packet[6] = ICMPV6;
    packet[7] = 255; // receivers drop any other hop limit
    packet[8..24].copy_from_slice(&address.octets());
    packet[24..40].copy_from_slice(&all_nodes.octets());
    packet[40] = 136; // neighbour advertisement
    packet[44] = 0x20; // override
    packet[48..64].copy_from_slice(&address.octets());
    packet[64] = 2; // option: target link-layer address
    packet[65] = 1; // of 8 bytes
    packet[66..72].copy_from_slice(&mac);

    let mut sum = u32::from(BODY) + u32::from(ICMPV6);
    for word in packet[8..72].chunks_exact(2) {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[allow(clippy::cast_possible_truncation)] // folded to 16 bits above
    let checksum = !(sum as u16);
    packet[42..44].copy_from_slice(&checksum.to_be_bytes());
    packet
}

fn packet_socket(ethertype: u16) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers. std has no packet sockets.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            i32::from(ethertype.to_be()),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn link_address(index: u32, ethertype: u16, mac: [u8; 6]) -> io::Result<libc::sockaddr_ll> {
    // SAFETY: sockaddr_ll is plain numbers; all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex =
        i32::try_from(index).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
    address.sll_halen = 6;
    address.sll_addr[..6].copy_from_slice(&mac);
    Ok(address)
}

fn send_packet(
    socket: &OwnedFd,
    index: u32,
    ethertype: u16,
    to: [u8; 6],
    packet: &[u8],
) -> io::Result<()> {
    let address = link_address(index, ethertype, to)?;
    // SAFETY: both pointers are to live values of the lengths given; the kernel only reads them.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            mem::size_of_val(&address) as libc::socklen_t,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn bind_packet_socket(socket: &OwnedFd, index: u32, ethertype: u16) -> io::Result<()> {
    let address = link_address(index, ethertype, [0; 6])?;
    // SAFETY: the pointer is to a live value of the length given; the kernel only reads it.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of_val(&address) as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// One packet, or `None` when none came within `patience`.
fn receive_within(
    socket: &OwnedFd,
    packet: &mut [u8],
    patience: Duration,
) -> io::Result<Option<usize>> {
    let mut poll = [rustix::event::PollFd::new(
        socket,
        rustix::event::PollFlags::IN,
    )];
    let timeout = rustix::event::Timespec::try_from(patience)
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    if rustix::event::poll(&mut poll, Some(&timeout))? == 0 {
        return Ok(None);
    }
    let (length, _) = rustix::net::recv(socket, packet, rustix::net::RecvFlags::empty())?;
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn gratuitous_arp_has_the_bytes_of_rfc_826() {
        let address = Ipv4Addr::new(192, 168, 1, 9);
        let packet = arp(ARP_REPLY, MAC, address, BROADCAST, address);
        assert_eq!(packet[..8], [0, 1, 8, 0, 6, 4, 0, 2]);
        assert_eq!(packet[8..18], [2, 0, 0, 0, 0, 7, 192, 168, 1, 9]);
        assert_eq!(packet[24..], [192, 168, 1, 9]);
        assert_eq!(arp_sender(&packet, address), Some(MAC));
        assert_eq!(arp_sender(&packet, Ipv4Addr::new(192, 168, 1, 8)), None);
        assert_eq!(arp_sender(&packet[..20], address), None);
    }

    #[test]
    fn neighbour_advertisement_sums_up() {
        let packet = neighbour_advertisement(MAC, "fd00::9".parse().unwrap());
        let mut sum = 32 + 58;
        for word in packet[8..].chunks(2) {
            sum += u32::from(word[0]) << 8 | u32::from(word[1]);
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        assert_eq!(sum, 0xffff, "a checksum over itself is all ones");
        assert_eq!(packet[7], 255);
        assert_eq!(packet[66..], MAC);
    }
}
