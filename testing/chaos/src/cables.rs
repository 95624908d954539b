//! Machines out of network namespaces, joined by two networks: `lan` for everything and `repl`,
//! which replication prefers; and by `six`, which has IPv6 only and of which daemons know nothing unless a test
//! tells them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
};

use relevo_host::{command::NsCommand, hub::Hub, netns::NetNs};

/// The networks; their numbers are the second byte of the addresses.
const NETWORKS: [(&str, u8); 2] = [("lan", 79), ("repl", 80)];

/// The third network.
const SIX: &str = "six";

/// What a cut machine can't do any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Nothing arrives.
    In,
    /// Nothing gets out.
    Out,
}

/// A hub with a cable to each machine, on each network.
#[derive(Debug)]
pub struct Cables {
    hub: Hub,
    machines: BTreeMap<String, NetNs>,
}

impl Cables {
    /// A hub without machines.
    ///
    /// # Panics
    /// The kernel refuses: the tests need root.
    #[must_use]
    pub fn new() -> Self {
        let [(lan, _), (repl, _)] = NETWORKS;
        let hub = Hub::new(&[lan, repl, SIX]).unwrap();
        Self {
            hub,
            machines: BTreeMap::new(),
        }
    }

    /// Makes a machine with an address on each network. Returns its namespace and its `--path`
    /// arguments.
    ///
    /// # Panics
    /// The name is in use or longer than 10 bytes, or the kernel refuses.
    pub fn plug(&mut self, name: &str) -> (NetNs, Vec<String>) {
        let number = u8::try_from(self.machines.len() + 1).unwrap();
        let namespace = NetNs::new(name).unwrap();
        let mut paths = Vec::new();
        for (network, byte) in NETWORKS {
            let address = Ipv4Addr::new(10, byte, 0, number);
            self.hub
                .plug(name, &namespace, network, IpAddr::V4(address))
                .unwrap();
            let mark = if network == "repl" {
                ",replication"
            } else {
                ""
            };
            paths.push(format!("{network}={address}{mark}"));
        }
        let six = Self::six(number);
        self.hub
            .plug(name, &namespace, SIX, IpAddr::V6(six))
            .unwrap();
        self.machines.insert(name.to_owned(), namespace.clone());
        (namespace, paths)
    }

    /// The address of the machine that was plugged in as the `number`th, from 1, on the network `six`.
    #[must_use]
    pub fn six(number: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd79, 0, 0, 0, 0, 0, 0, u16::from(number))
    }

    /// Pulls or plugs a machine's cables.
    ///
    /// # Panics
    /// There is no such machine.
    pub fn set(&self, machine: &str, up: bool) {
        // The replication path first: whoever connects when it comes back shall find it.
        for network in ["repl", "lan", SIX] {
            self.hub.set_cable(machine, network, up).unwrap();
        }
    }

    /// Pulls or plugs a machine's cable of one network: `lan`, `repl` or `six`.
    ///
    /// # Panics
    /// There is no such machine or network.
    pub fn set_one(&self, machine: &str, network: &str, up: bool) {
        self.hub.set_cable(machine, network, up).unwrap();
    }

    /// Drops whatever a machine receives or sends from now on.
    ///
    /// # Panics
    /// There is no such machine, or nftables refuses.
    pub fn drop_all(&self, machine: &str, direction: Direction) {
        let rules = match direction {
            Direction::In => chains(r#"iifname != "lo" drop"#, ""),
            Direction::Out => chains("", r#"oifname != "lo" drop"#),
        };
        self.nft(machine, &rules);
    }

    /// Drops the packets of one TCP port, on all networks and in both directions.
    ///
    /// # Panics
    /// There is no such machine, or nftables refuses.
    pub fn drop_port(&self, machine: &str, port: u16) {
        let rule = format!("tcp sport {port} drop; tcp dport {port} drop");
        self.nft(machine, &chains(&rule, &rule));
    }

    /// Takes every filter of a machine away.
    ///
    /// # Panics
    /// There is no such machine, or nftables refuses.
    pub fn undo_drops(&self, machine: &str) {
        self.nft(machine, "flush ruleset");
    }

    fn nft(&self, machine: &str, rules: &str) {
        let child = NsCommand::new("nft")
            .arg(rules)
            .in_namespace(&self.machines[machine])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "nft on {machine}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Whether nftables can be used; else why not.
    ///
    /// # Errors
    /// A sentence.
    pub fn can_filter() -> Result<(), String> {
        match Command::new("nft").arg("--version").output() {
            Ok(output) if output.status.success() => Ok(()),
            _ => Err("nft is not installed (Debian: nftables)".to_owned()),
        }
    }
}

impl Default for Cables {
    fn default() -> Self {
        Self::new()
    }
}

fn chains(arriving: &str, leaving: &str) -> String {
    format!(
        "table inet chaos {{ \
         chain arriving {{ type filter hook input priority 0; {arriving}; }}; \
         chain leaving {{ type filter hook output priority 0; {leaving}; }}; }}"
    )
}
