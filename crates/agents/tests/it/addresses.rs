//! The address keeper under a lease that comes and goes.

use std::{net::IpAddr, time::Duration};

use relevo_agents::{AddressKeeper, PartFailed, PartHealth};
use relevo_host::{clock, netns::NetNs};
use relevo_types::{ServiceId, Time, cluster::AddressPart};
use tokio::sync::mpsc;

use crate::need;

const SERVICE: ServiceId = ServiceId(1);

struct Machine {
    namespace: NetNs,
    keeper: AddressKeeper,
    failures: mpsc::Receiver<PartFailed>,
}

fn machine(test: &str) -> Option<Machine> {
    let namespace = need(test, NetNs::new("machine"))?;
    namespace.add_cable("eth0", &namespace, "far").unwrap();
    namespace
        .add_address("eth0", "10.98.0.1".parse().unwrap(), 24)
        .unwrap();
    let (report, failures) = mpsc::channel(8);
    let keeper = namespace
        .run(|| AddressKeeper::start(report))
        .unwrap()
        .unwrap();
    Some(Machine {
        namespace,
        keeper,
        failures,
    })
}

impl Machine {
    fn has(&self, address: IpAddr) -> bool {
        self.namespace
            .with_netlink(async |netlink| netlink.addresses().await)
            .unwrap()
            .iter()
            .any(|there| there.address == address)
    }

    /// How long it took until the address was there, or was not.
    async fn until(&self, address: IpAddr, there: bool) -> Duration {
        let began = clock::now();
        while self.has(address) != there {
            assert!(
                clock::now().since(began) < Duration::from_secs(10),
                "in vain"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        clock::now().since(began)
    }
}

fn part(address: &str) -> AddressPart {
    AddressPart {
        address: address.parse().unwrap(),
        prefix: 24,
        interface: None,
    }
}

fn long_lease() -> Time {
    clock::now() + Duration::from_secs(3600)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_held_exactly_while_the_lease_lasts() {
    let Some(machine) = machine("an_address_is_held_exactly_while_the_lease_lasts") else {
        return;
    };
    let Machine {
        keeper, namespace, ..
    } = &machine;
    let part = part("10.98.0.9");
    let address = part.address;

    let error = keeper
        .take(SERVICE, 0, &part)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("no lease"), "{error}");
    assert_eq!(keeper.probe(&part).await, PartHealth::Inactive);

    keeper.lease_until(long_lease());
    keeper.take(SERVICE, 0, &part).await.unwrap();
    keeper.take(SERVICE, 0, &part).await.unwrap();
    assert_eq!(keeper.probe(&part).await, PartHealth::Active);
    let error = keeper
        .take(ServiceId(2), 0, &part)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("service s1 has it"), "{error}");
    let until = clock::now() + Duration::from_secs(3);
    while clock::now() < until {
        assert!(
            machine.has(address),
            "longer than its lifetime in the kernel"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    namespace
        .with_netlink(async |netlink| {
            let index = netlink.link("eth0").await?.index;
            netlink.remove_address(index, address, 32).await
        })
        .unwrap();
    let back = machine.until(address, true).await;
    assert!(back < Duration::from_secs(2), "put back: {back:?}");

    keeper.lease_until(clock::now() + Duration::from_millis(300));
    let gone = machine.until(address, false).await;
    assert!(gone >= Duration::from_millis(200), "{gone:?}");
    assert!(
        gone < Duration::from_millis(900),
        "before the kernel's lifetime ends: {gone:?}"
    );
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(!machine.has(address), "and stays away");
    assert!(matches!(keeper.probe(&part).await, PartHealth::Impaired(_)));

    keeper.lease_until(long_lease());
    machine.until(address, true).await;
    keeper.give_up(&part).await.unwrap();
    assert!(!machine.has(address));
    keeper.give_up(&part).await.unwrap();
    assert!(machine.has("10.98.0.1".parse().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_configured_for_good_is_refused_and_left_alone() {
    let test = "an_address_that_is_configured_for_good_is_refused_and_left_alone";
    let Some(machine) = machine(test) else { return };
    machine.keeper.lease_until(long_lease());
    let part = part("10.98.0.1");
    let with_interface = AddressPart {
        interface: Some("eth0".into()),
        ..part
    };
    let error = machine
        .keeper
        .take(SERVICE, 0, &with_interface)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("for good"), "{error}");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(machine.has(with_interface.address));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_interface_is_reported_and_a_dropped_keeper_cleans_up() {
    let test = "a_lost_interface_is_reported_and_a_dropped_keeper_cleans_up";
    let Some(mut machine) = machine(test) else {
        return;
    };
    machine.keeper.lease_until(long_lease());
    let part = part("10.98.0.9");
    machine.keeper.take(SERVICE, 4, &part).await.unwrap();
    machine
        .namespace
        .with_netlink(async |netlink| netlink.remove_link(netlink.link("eth0").await?.index).await)
        .unwrap();
    let patience = Duration::from_secs(10);
    let failed = tokio::time::timeout(patience, machine.failures.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((failed.service, failed.index), (SERVICE, 4));
    assert!(failed.reason.contains("10.98.0.9"), "{}", failed.reason);

    // The same address elsewhere, and the keeper's last handle gone.
    machine.keeper.give_up(&part).await.unwrap();
    machine
        .namespace
        .add_cable("eth1", &machine.namespace, "far1")
        .unwrap();
    machine
        .namespace
        .add_address("eth1", "10.98.0.2".parse().unwrap(), 24)
        .unwrap();
    machine.keeper.take(SERVICE, 4, &part).await.unwrap();
    let (report, _) = mpsc::channel(1);
    let other = machine
        .namespace
        .run(|| AddressKeeper::start(report))
        .unwrap()
        .unwrap();
    drop(std::mem::replace(&mut machine.keeper, other));
    let gone = machine.until(part.address, false).await;
    assert!(gone < Duration::from_millis(700), "at once: {gone:?}");
}
