//! Split brain with real daemons: a replica is forced while the primary still writes alone, both histories
//! meet, nothing is overwritten until a person decides, and then nothing is lost.

use std::{fs, path::PathBuf, time::Duration};

use chaos::Cables;
use relevo_export::nbd::{Client, NbdAddr};

use crate::daemons::{Daemon, Site, eventually};

const BOUND: Duration = Duration::from_secs(40);

const BLOCK: usize = 4096;

const SIZE: usize = 16 << 20;

/// Machines with a volume that no service uses.
struct Forked {
    // In the order of taking down.
    daemons: [Daemon; 3],
    _cables: Cables,
    _site: Site,
}

fn write(daemon: &Daemon, block: usize, fill: &[u8]) {
    let address = NbdAddr::Unix(daemon.nbd_socket("mail"));
    let mut client = Client::connect(&address, "mail", Some(BOUND)).unwrap();
    let data: Vec<u8> = fill.iter().flat_map(|byte| vec![*byte; BLOCK]).collect();
    client.write((block * BLOCK) as u64, &data, true).unwrap();
}

fn content(daemon: &Daemon) -> Vec<u8> {
    let pool = daemon.state_dir().join("pool");
    let file = fs::read_dir(pool).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(file).unwrap();
    bytes.truncate(SIZE);
    bytes
}

fn volume(daemon: &Daemon) -> serde_json::Value {
    daemon.find("volumes", "mail")
}

fn in_sync(daemon: &Daemon, names: &[&str]) -> bool {
    volume(daemon)["in_sync"] == serde_json::json!(names)
}

impl Forked {
    /// Two data nodes and a witness.
    fn cluster(test: &str) -> Option<([Daemon; 3], Cables, Site)> {
        if !rustix::process::geteuid().is_root() {
            said::skip(test, "it needs root, for network namespaces");
            return None;
        }
        let site = Site::new();
        let mut cables = Cables::new();
        let daemons = ["alfa", "beta", "wit"].map(|name| {
            let (namespace, paths) = cables.plug(name);
            site.daemon_in(name, namespace, paths)
        });
        let [alfa, beta, wit] = &daemons;
        alfa.init("campus");
        beta.join(&alfa.token(&[]), &[]);
        wit.join(&alfa.token(&["--witness"]), &["--witness"]);
        eventually(BOUND, "every node hears every other", || {
            daemons.iter().all(|daemon| daemon.hears(3))
        });
        alfa.ok(&["volume", "create", "mail", "--size", "16MiB"]);
        Some((daemons, cables, site))
    }

    /// alfa wrote blocks 1 to 3 alone; beta, forced, blocks 3 and 9. They met.
    fn new(test: &str) -> Option<Self> {
        let (daemons, cables, site) = Self::cluster(test)?;
        let [alfa, beta, _] = &daemons;
        alfa.ok(&["primary", "mail"]);
        write(alfa, 0, &[1, 1]);

        // beta misses what alfa writes from here on.
        beta.ok(&["disconnect", "mail"]);
        eventually(BOUND, "beta left", || in_sync(alfa, &["alfa"]));
        write(alfa, 1, &[0xa1, 0xa2, 0xa3]);
        let err = beta.refused(&["primary", "mail", "--force", "--confirm", "mail"]);
        assert!(err.contains("alfa is primary"), "{err}");
        // And then alfa is gone.
        cables.set("alfa", false);
        eventually(BOUND, "alfa is deposed", || {
            volume(beta)["primary"].is_null()
        });

        let err = beta.refused(&["primary", "mail"]);
        assert!(
            err.contains("not in sync") || err.contains("in-sync"),
            "{err}"
        );
        assert!(err.contains("primary mail --force"), "{err}");
        let err = beta.refused(&["primary", "mail", "--force"]);
        assert!(err.contains("nothing was done"), "{err}");
        assert!(err.contains("alfa is in sync and has everything"), "{err}");
        assert!(err.contains("epoch"), "{err}");
        let err = beta.refused(&["primary", "mail", "--force", "--confirm", "yes"]);
        assert!(err.contains("`yes` is not the name"), "{err}");
        assert!(volume(beta)["primary"].is_null(), "nothing was done");
        // On a terminal it asks, and takes nothing but the name.
        for (typed, code, words) in [
            ("beta\n", 1, "nothing was done: `beta` is not the name"),
            ("\n", 1, "nothing was done: `` is not the name"),
            ("mail\n", 0, "new history"),
        ] {
            assert!(volume(beta)["primary"].is_null(), "nothing was done yet");
            let answer = beta.typed(&["primary", "mail", "--force"], typed);
            let out = &answer.out;
            assert_eq!(answer.code, code, "{out}");
            assert!(out.contains("alfa is in sync and has everything"), "{out}");
            assert!(out.contains("Type the name of the volume"), "{out}");
            assert!(out.contains(words), "{out}");
        }
        assert!(in_sync(beta, &["beta"]));
        write(beta, 3, &[0xb3]);
        write(beta, 9, &[0xb9]);

        cables.set("alfa", true);
        beta.ok(&["connect", "mail"]);
        for daemon in [alfa, beta] {
            eventually(BOUND, "both know of the split", || {
                let links = volume(daemon)["links"].clone();
                let stands = links
                    .as_object()
                    .is_some_and(|links| links.values().any(|state| state == "StandAlone"));
                stands && !volume(daemon)["splits"].as_array().unwrap().is_empty()
            });
        }
        // The links are back a moment before the lease is, without which a node calls all of it down.
        eventually(BOUND, "alfa has a lease again", || {
            alfa.run(&["status"]).code == 1
        });
        Some(Self {
            daemons,
            _cables: cables,
            _site: site,
        })
    }

    /// Nothing was overwritten, and status says what each has and what decides.
    fn expect_alarm(&self) {
        let [alfa, beta, wit] = &self.daemons;
        let (ours, theirs) = (content(alfa), content(beta));
        for (block, fill) in [(1, 0xa1), (2, 0xa2), (3, 0xa3)] {
            assert_eq!(ours[block * BLOCK], fill);
        }
        for (block, fill) in [(1, 1), (3, 0xb3), (9, 0xb9)] {
            assert_eq!(theirs[block * BLOCK], fill);
        }
        for daemon in [alfa, beta, wit] {
            let status = daemon.run(&["status"]);
            assert_eq!(status.code, 1, "{}", status.out);
            for words in [
                "SPLIT BRAIN of volume mail",
                "only alfa has 0.0 MiB (3 blocks of 4 KiB)",
                "only beta has",
                "resolve mail --keep alfa",
                "resolve mail --keep beta",
            ] {
                assert!(status.out.contains(words), "no `{words}` in {}", status.out);
            }
        }
        for daemon in [alfa, beta] {
            let links = daemon.ok(&["cstate", "mail"]);
            assert!(links.contains("StandAlone"), "{links}");
        }
        let events = beta.ok(&["events"]);
        assert!(events.contains("split brain with alfa"), "{events}");
    }

    /// The loser's file, by the loser's word.
    fn saved(&self, loser: &Daemon, winner: &str) -> PathBuf {
        let list = loser.ok(&["volume", "saved", "mail", "--json"]);
        let files: serde_json::Value = serde_json::from_str(&list).unwrap();
        assert_eq!(files.as_array().unwrap().len(), 1, "{list}");
        let file = &files[0];
        assert_eq!(file["complete"], true, "{list}");
        assert_eq!(file["gave_way_to"], winner, "{list}");
        assert_eq!(file["node"], loser.name(), "{list}");
        let text = loser.ok(&["volume", "saved"]);
        assert!(text.contains("complete") && text.contains(winner), "{text}");
        let events = loser.ok(&["events"]);
        let path = file["path"].as_str().unwrap();
        assert!(events.contains(path), "{events}");
        PathBuf::from(path)
    }

    /// The loser had `expected`; it is in its file byte for byte, and its replica is like the winner's.
    fn expect_saved(&self, loser: usize, winner: usize, expected: &[u8], blocks: &[(usize, u8)]) {
        let (loser, winner) = (&self.daemons[loser], &self.daemons[winner]);
        eventually(BOUND, "both are in sync", || {
            in_sync(winner, &["alfa", "beta"])
        });
        let file = self.saved(loser, winner.name());
        let image = loser.state_dir().join("image");
        let args = ["volume", "saved", "--read", file.to_str().unwrap()];
        let args = [&args[..], &["--to", image.to_str().unwrap()]].concat();
        loser.ok(&args);
        let restored = fs::read(&image).unwrap();
        assert_eq!(restored.len(), SIZE);
        let ranges = loser.ok(&["volume", "saved", "--list", file.to_str().unwrap()]);
        let mut saved = Vec::new();
        for line in ranges.lines() {
            let (offset, len) = line.split_once(' ').unwrap();
            let (offset, len): (usize, usize) = (offset.parse().unwrap(), len.parse().unwrap());
            assert!(restored[offset..offset + len] == expected[offset..offset + len]);
            saved.extend(offset / BLOCK..(offset + len) / BLOCK);
        }
        for (block, fill) in blocks {
            assert!(saved.contains(block), "block {block} of {saved:?}");
            assert_eq!(restored[block * BLOCK..][..BLOCK], [*fill; BLOCK]);
        }
        let err = loser.refused(&args);
        assert!(err.contains("can't be made"), "{err}");
        assert!(content(&self.daemons[0]) == content(&self.daemons[1]));
        eventually(BOUND, "all is well", || winner.run(&["status"]).code == 0);
    }
}

#[test]
fn a_split_brain_is_seen_decided_for_the_forced_side_and_the_other_is_saved() {
    let test = "a_split_brain_is_seen_decided_for_the_forced_side_and_the_other_is_saved";
    let Some(forked) = Forked::new(test) else {
        return;
    };
    forked.expect_alarm();
    let [alfa, beta, wit] = &forked.daemons;
    let lost = content(alfa);
    let err = wit.refused(&["volume", "resolve", "mail", "--keep", "beta"]);
    assert!(err.contains("nothing was done"), "{err}");
    assert!(err.contains("only beta has"), "{err}");
    let err = wit.refused(&["volume", "resolve", "mail", "--keep", "wit"]);
    assert!(err.contains("no replica"), "{err}");
    let args = ["volume", "resolve", "mail", "--keep", "beta"];
    let out = wit.ok(&[&args[..], &["--confirm", "mail"]].concat());
    assert!(out.contains("keeps the replica on beta"), "{out}");
    forked.expect_saved(0, 1, &lost, &[(1, 0xa1), (2, 0xa2), (3, 0xa3)]);
    let nothing = beta.ok(&["volume", "saved"]);
    assert!(nothing.contains("Nothing is saved"), "{nothing}");
    let err = beta.refused(&[&args[..], &["--confirm", "mail"]].concat());
    assert!(err.contains("every replica is in sync"), "{err}");
}

#[test]
fn a_split_brain_is_decided_for_the_side_that_was_replaced() {
    let test = "a_split_brain_is_decided_for_the_side_that_was_replaced";
    let Some(forked) = Forked::new(test) else {
        return;
    };
    let [alfa, beta, _] = &forked.daemons;
    let lost = content(beta);
    let args = [
        "volume",
        "resolve",
        "mail",
        "--keep",
        "alfa",
        "--confirm",
        "mail",
    ];
    let err = alfa.refused(&args);
    assert!(err.contains("beta is primary"), "{err}");
    assert!(err.contains("secondary mail"), "{err}");
    beta.ok(&["secondary", "mail"]);
    // Nodes read the log a moment after each other.
    eventually(BOUND, "alfa knows", || volume(alfa)["primary"].is_null());
    let out = alfa.ok(&args);
    assert!(out.contains("primary mail"), "{out}");
    alfa.ok(&["primary", "mail"]);
    forked.expect_saved(1, 0, &lost, &[(3, 0xb3), (9, 0xb9)]);
    assert_eq!(content(beta)[BLOCK], 0xa1);
}

/// A service whose last good replica is lost: it waits for a person, starts on the node whose replica was
/// forced, and stays there when the other one comes back with writes of its own. What becomes of those is
/// as it was configured.
#[test]
fn a_service_goes_on_with_a_forced_replica() {
    let test = "a_service_goes_on_with_a_forced_replica";
    for policy in ["disconnect", "discard-older-primary"] {
        let Some((daemons, cables, _site)) = Forked::cluster(test) else {
            return;
        };
        let [alfa, beta, wit] = &daemons;
        let set = format!("after-split-brain={policy}");
        alfa.ok(&["volume", "set", "mail", &set]);
        let service = [
            "service",
            "create",
            "mail",
            "--volume",
            "mail",
            "--no-device",
        ];
        let on = ["--exec", "/bin/sleep 100000", "--on", "alfa"];
        alfa.ok(&[&service[..], &on].concat());
        let runs_on = |daemon: &Daemon, node: &str| {
            let service = daemon.find("services", "mail");
            service["state"] == "running" && service["node"] == node
        };
        eventually(BOUND, "the service runs", || runs_on(alfa, "alfa"));
        write(alfa, 0, &[1, 1]);
        beta.ok(&["disconnect", "mail"]);
        eventually(BOUND, "beta left", || in_sync(alfa, &["alfa"]));
        write(alfa, 1, &[0xa1, 0xa2]);
        cables.set("alfa", false);
        eventually(BOUND, "the service waits", || {
            let wait = beta.find("services", "mail")["wait"]["why"].clone();
            wait.as_str().is_some_and(|why| why.contains("not in sync"))
        });
        assert!(volume(beta)["primary"].is_null(), "nobody decided");

        let out = beta.ok(&["primary", "mail", "--force", "--confirm", "mail"]);
        assert!(out.contains("Service mail takes it over here"), "{out}");
        eventually(BOUND, "the service runs again", || runs_on(beta, "beta"));
        write(beta, 9, &[0xb9]);

        cables.set("alfa", true);
        beta.ok(&["connect", "mail"]);
        if policy == "disconnect" {
            eventually(BOUND, "both stand alone", || {
                !volume(beta)["splits"].as_array().unwrap().is_empty()
            });
            assert_eq!(content(alfa)[BLOCK], 0xa1, "nothing is overwritten");
        } else {
            eventually(BOUND, "alfa gave way", || in_sync(beta, &["alfa", "beta"]));
            let files = alfa.ok(&["volume", "saved", "mail", "--json"]);
            let files: serde_json::Value = serde_json::from_str(&files).unwrap();
            assert_eq!(files[0]["complete"], true, "{files}");
            assert_eq!(content(alfa)[BLOCK], 1, "what beta has");
        }
        assert!(runs_on(wit, "beta"), "it stays where it is");
        write(beta, 10, &[0xba]);
    }
}
