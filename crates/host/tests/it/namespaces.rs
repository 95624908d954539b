//! Machines out of namespaces: bridges, cables, cuts.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use relevo_host::netns::NetNs;

use crate::{eventually, need};

/// Three machines on a bridge, `10.99.0.1` to `.3` and `fd99::1` to `::3`, each by its `eth0`.
pub(crate) struct Lan {
    pub(crate) hub: NetNs,
    pub(crate) machines: Vec<NetNs>,
}

pub(crate) fn address(number: usize) -> IpAddr {
    format!("10.99.0.{number}").parse().unwrap()
}

pub(crate) fn address6(number: usize) -> IpAddr {
    format!("fd99::{number}").parse().unwrap()
}

impl Lan {
    pub(crate) fn new(test: &str) -> Option<Self> {
        let hub = need(test, NetNs::new("hub"))?;
        hub.add_bridge("lan").unwrap();
        let machines = (1..=3)
            .map(|number| {
                let machine = NetNs::new(&format!("machine {number}")).unwrap();
                let port = format!("port{number}");
                hub.add_cable(&port, &machine, "eth0").unwrap();
                hub.add_port("lan", &port).unwrap();
                machine.add_address("eth0", address(number), 24).unwrap();
                machine.add_address("eth0", address6(number), 64).unwrap();
                machine
            })
            .collect();
        Some(Self { hub, machines })
    }
}

/// Whether a datagram reaches `address` in `to` from `from`, tried for a while.
pub(crate) fn reaches(from: &NetNs, to: &NetNs, address: IpAddr, patience: Duration) -> bool {
    let receiver = to
        .run(|| UdpSocket::bind(SocketAddr::new(address, 0)))
        .unwrap()
        .unwrap();
    receiver.set_nonblocking(true).unwrap();
    let target = receiver.local_addr().unwrap();
    let any: IpAddr = if address.is_ipv4() {
        "0.0.0.0".parse().unwrap()
    } else {
        "::".parse().unwrap()
    };
    let sender = from
        .run(|| UdpSocket::bind(SocketAddr::new(any, 0)))
        .unwrap()
        .unwrap();
    eventually(patience, || {
        // A cut cable may be an error at once; that is an answer too.
        drop(sender.send_to(b"relevo", target));
        std::thread::sleep(Duration::from_millis(10));
        let mut buffer = [0; 16];
        receiver
            .recv(&mut buffer)
            .is_ok_and(|length| &buffer[..length] == b"relevo")
    })
}

const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(300);

#[test]
fn three_machines_on_a_bridge_reach_each_other_until_a_cable_is_cut() {
    let Some(lan) = Lan::new("three_machines_on_a_bridge") else {
        return;
    };
    let [one, two, three] = lan.machines.as_slice() else {
        panic!("three machines");
    };
    assert!(reaches(one, two, address(2), LONG));
    assert!(reaches(two, three, address(3), LONG));
    assert!(reaches(three, one, address(1), LONG));
    assert!(reaches(three, one, address6(1), LONG));

    lan.hub.set_up("port1", false).unwrap();
    assert!(!reaches(three, one, address(1), SHORT));
    assert!(!reaches(one, two, address(2), SHORT));
    assert!(reaches(two, three, address(3), LONG));
    let running = one
        .with_netlink(async |netlink| Ok(netlink.link("eth0").await?.running))
        .unwrap();
    assert!(!running, "the far end loses its carrier");

    lan.hub.set_up("port1", true).unwrap();
    assert!(reaches(three, one, address(1), LONG));
}

#[test]
fn isolated_ports_reach_only_the_others() {
    let Some(lan) = Lan::new("isolated_ports_reach_only_the_others") else {
        return;
    };
    let [one, two, three] = lan.machines.as_slice() else {
        panic!("three machines");
    };
    lan.hub.set_isolated("port1", true).unwrap();
    lan.hub.set_isolated("port2", true).unwrap();
    assert!(!reaches(one, two, address(2), SHORT));
    assert!(reaches(one, three, address(3), LONG));
    assert!(reaches(three, two, address(2), LONG));
    lan.hub.set_isolated("port1", false).unwrap();
    assert!(reaches(one, two, address(2), LONG));
}

#[test]
fn errors_name_what_is_there() {
    let Some(namespace) = need("errors_name_what_is_there", NetNs::new("alone")) else {
        return;
    };
    let error = namespace.set_up("eth7", true).unwrap_err().to_string();
    assert!(
        error.contains("eth7") && error.contains("use one of: lo"),
        "{error}"
    );
    let error = namespace
        .add_cable("a-name-that-is-too-long", &namespace, "b")
        .unwrap_err()
        .to_string();
    assert!(error.contains("a-name-that-is-too-long"), "{error}");
    assert!(NetNs::current().unwrap().kill_all().is_err());
}
