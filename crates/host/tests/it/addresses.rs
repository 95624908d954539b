//! Virtual addresses: the kernel ends them, renewal keeps them, neighbours hear of them.

use std::{env, net::IpAddr, time::Duration};

use relevo_host::{
    address::{self, LIFETIME_BOUND},
    clock,
    command::NsCommand,
    netlink::Netlink,
    netns::NetNs,
};

use crate::{
    eventually,
    namespaces::{Lan, address, address6, reaches},
    need,
};

const RENEWED: &str = "RELEVO_TEST_RENEWED_ADDRESS";

/// Not a test: the process that the next test kills.
#[test]
#[ignore = "run by the_kernel_removes_the_address_of_a_killed_process"]
fn renewer() {
    let Ok(address) = env::var(RENEWED) else {
        return;
    };
    let address: IpAddr = address.parse().unwrap();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async {
            let netlink = Netlink::open().unwrap();
            let place = address::find(&netlink, address, 24, None).await.unwrap();
            loop {
                place.put(&netlink).await.unwrap();
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
}

fn has(namespace: &NetNs, address: IpAddr) -> bool {
    namespace
        .with_netlink(async |netlink| netlink.addresses().await)
        .unwrap()
        .iter()
        .any(|there| there.address == address)
}

#[test]
fn the_kernel_removes_the_address_of_a_killed_process() {
    let test = "the_kernel_removes_the_address_of_a_killed_process";
    let Some(machine) = need(test, NetNs::new("machine")) else {
        return;
    };
    machine.add_cable("eth0", &machine, "far").unwrap();
    for (own, virtual_address) in [(address(1), address(9)), (address6(1), address6(9))] {
        machine.add_address("eth0", own, 24).unwrap();
        let mut child = NsCommand::new(env::current_exe().unwrap())
            .args(["--exact", "addresses::renewer", "--ignored"])
            .env(RENEWED, virtual_address.to_string())
            .stdout(std::process::Stdio::null())
            .in_namespace(&machine)
            .own_mounts()
            .spawn()
            .unwrap();
        assert!(eventually(Duration::from_secs(10), || has(
            &machine,
            virtual_address
        )));
        let renewed_until = clock::now() + Duration::from_secs(3);
        while clock::now() < renewed_until {
            assert!(has(&machine, virtual_address), "renewal keeps it");
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill().unwrap();
        let killed = clock::now();
        child.wait().unwrap();
        assert!(eventually(Duration::from_secs(5), || !has(
            &machine,
            virtual_address
        )));
        let lived = clock::now().since(killed);
        println!("{virtual_address} lived {lived:?} longer than its keeper");
        // The rest is what a loaded machine needs to look.
        assert!(
            lived < LIFETIME_BOUND + Duration::from_millis(400),
            "{lived:?}"
        );
        assert!(has(&machine, own), "the machine's own address stays");
    }
}

#[test]
fn the_interface_is_found_by_its_network() {
    let Some(lan) = Lan::new("the_interface_is_found_by_its_network") else {
        return;
    };
    let machine = &lan.machines[0];
    let find = |address: &str, prefix, interface: Option<&str>| {
        let address = address.parse().unwrap();
        machine
            .with_netlink(async |netlink| address::find(netlink, address, prefix, interface).await)
    };
    let place = find("10.99.0.77", 24, None).unwrap();
    assert_eq!((place.interface.as_str(), place.prefix), ("eth0", 32));
    let place = find("fd99::77", 64, None).unwrap();
    assert_eq!((place.interface.as_str(), place.prefix), ("eth0", 128));
    let place = find("10.55.0.1", 24, Some("eth0")).unwrap();
    assert_eq!(place.prefix, 24, "the first address of its network");
    let error = find("10.55.0.1", 24, None).unwrap_err().to_string();
    assert!(error.contains("no interface of this node"), "{error}");
    let error = find("10.99.0.77", 24, Some("eth9"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("use one of: lo, eth0"), "{error}");
    assert!(find("10.99.0.77", 33, None).is_err());
    machine.set_up("eth0", false).unwrap();
    let error = find("10.55.0.1", 24, Some("eth0")).unwrap_err().to_string();
    assert!(error.contains("is down"), "{error}");
}

#[test]
fn neighbours_follow_an_announced_address_at_once() {
    let Some(lan) = Lan::new("neighbours_follow_an_announced_address_at_once") else {
        return;
    };
    let [one, two, three] = lan.machines.as_slice() else {
        panic!("three machines");
    };
    for virtual_address in [address(9), address6(9)] {
        let take = |machine: &NetNs| {
            machine
                .with_netlink(async |netlink| {
                    let place = address::find(netlink, virtual_address, 24, None).await?;
                    netlink
                        .put_address(place.index, place.address, place.prefix, None)
                        .await?;
                    Ok((
                        place.announcement().unwrap(),
                        netlink.link("eth0").await?.mac,
                    ))
                })
                .unwrap()
        };
        let believes = || {
            three
                .with_netlink(async |netlink| netlink.neighbour(virtual_address).await)
                .unwrap()
        };
        let (_, mac_one) = take(one);
        assert!(reaches(three, one, virtual_address, Duration::from_secs(5)));
        assert!(eventually(Duration::from_secs(5), || believes()
            == Some(mac_one.clone())));

        // The first machine keeps it, as a killed one's kernel does for a while.
        let (announcement, mac_two) = take(two);
        two.run(|| announcement.send()).unwrap().unwrap();
        assert!(
            eventually(Duration::from_secs(1), || believes()
                == Some(mac_two.clone())),
            "{virtual_address}: {:?} instead of {mac_two:?}",
            believes()
        );
        assert!(reaches(three, two, virtual_address, Duration::from_secs(5)));
    }
}

#[test]
fn a_duplicate_is_seen() {
    let Some(lan) = Lan::new("a_duplicate_is_seen") else {
        return;
    };
    let [one, two, _] = lan.machines.as_slice() else {
        panic!("three machines");
    };
    let duplicate = |wanted: IpAddr, patience| {
        let place = one
            .with_netlink(async |netlink| address::find(netlink, wanted, 24, None).await)
            .unwrap();
        one.run(|| place.duplicate(patience)).unwrap().unwrap()
    };
    let mac = two
        .with_netlink(async |netlink| Ok(netlink.link("eth0").await?.mac))
        .unwrap();
    assert!(reaches(one, two, address(2), Duration::from_secs(5)));
    let found = duplicate(address(2), Duration::from_secs(5));
    assert_eq!(found.map(Vec::from), Some(mac));
    assert_eq!(duplicate(address(99), Duration::from_millis(100)), None);
}
