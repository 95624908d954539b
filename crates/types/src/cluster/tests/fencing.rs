use std::{collections::BTreeMap, path::PathBuf};

use super::{A, B, W, cluster};
use crate::{LeaseGeneration, NodeId, cluster::*};

fn device(name: &str, targets: &[(NodeId, u8)]) -> FenceDevice {
    FenceDevice {
        name: name.to_owned(),
        kind: FenceKind::Agent("fence_ipmilan".to_owned()),
        parameters: BTreeMap::from([
            ("ip".to_owned(), FenceValue::Plain("10.0.0.9".to_owned())),
            (
                "password".to_owned(),
                FenceValue::Secret("sesame".to_owned()),
            ),
        ]),
        targets: targets
            .iter()
            .map(|(node, level)| {
                let target = FenceTarget {
                    level: *level,
                    ..FenceTarget::default()
                };
                (*node, target)
            })
            .collect(),
        from: None,
        action_limit_s: 60,
        verify_limit_s: 30,
        check_every_s: 3600,
        trust_exit_code: false,
    }
}

fn add(state: &mut ClusterState, device: FenceDevice) -> Result<Outcome, Rejection> {
    state.apply(&Command::from(FenceCommand::AddDevice(device)))
}

fn refused(change: impl FnOnce(&mut FenceDevice)) -> String {
    let mut state = cluster();
    let mut asked = device("bmc", &[(B, 1)]);
    change(&mut asked);
    let before = state.fencing.clone();
    let error = add(&mut state, asked).unwrap_err();
    assert_eq!(state.fencing, before, "a refused device changed something");
    error.to_string()
}

#[test]
fn a_device_is_added_and_removed() {
    let mut state = cluster();
    add(&mut state, device("bmc", &[(B, 1)])).unwrap();
    assert_eq!(state.fencing.levels(B)[&1][0].name, "bmc");
    assert!(state.fencing.levels(A).is_empty());
    let twice = add(&mut state, device("bmc", &[(A, 1)])).unwrap_err();
    assert!(twice.to_string().contains("exists already"), "{twice}");
    let remove = |name: &str| {
        Command::from(FenceCommand::RemoveDevice {
            name: name.to_owned(),
        })
    };
    let unknown = state.apply(&remove("bcm")).unwrap_err();
    assert!(unknown.to_string().contains("no fence device `bcm`"));
    state.apply(&remove("bmc")).unwrap();
    assert_eq!(state.fencing, Fencing::default());
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    let agent = |name: &str| {
        let kind = FenceKind::Agent(name.to_owned());
        refused(|it| it.kind = kind)
    };
    for name in [
        "ipmilan",
        "fence_",
        "fence_../../bin/sh",
        "fence_a/b",
        "/usr/sbin/fence_apc",
    ] {
        assert!(agent(name).contains("without a directory"), "{name}");
    }
    let command = |words: &[&str]| {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        refused(|it| it.kind = FenceKind::Command(words))
    };
    assert!(command(&[]).contains("absolute path"));
    assert!(command(&["sh", "-c", "x"]).contains("absolute path"));
    assert!(command(&["/{node}"]).contains("absolute path"));
    assert!(command(&["/bin/x", "a\nb"]).contains("line end"));

    let parameter = |name: &str, value: FenceValue| {
        refused(|it| {
            it.parameters.insert(name.to_owned(), value);
        })
    };
    let plain = |text: &str| FenceValue::Plain(text.to_owned());
    for ours in ["action", "plug", "port", "delay", "nodename", "option"] {
        assert!(
            parameter(ours, plain("x")).contains("can't be set"),
            "{ours}"
        );
    }
    let smuggled = parameter("password", FenceValue::Secret("a\naction=on".to_owned()));
    assert!(smuggled.contains("line end"), "{smuggled}");
    assert!(
        !smuggled.contains("action=on"),
        "a secret is shown: {smuggled}"
    );
    assert!(parameter("a b", plain("x")).contains("no name of a parameter"));
    assert!(parameter("password", FenceValue::File(PathBuf::from("pw"))).contains("absolute"));

    assert!(refused(|it| it.targets.clear()).contains("switches no node off"));
    assert!(
        refused(|it| {
            it.targets.insert(
                NodeId(9),
                FenceTarget {
                    level: 1,
                    ..FenceTarget::default()
                },
            );
        })
        .contains("no node n9")
    );
    let level = |level: u8| refused(|it| it.targets.get_mut(&B).unwrap().level = level);
    assert!(level(0).contains("is none"));
    assert!(level(10).contains("is none"));
    assert!(level(2).contains("level 2 (bmc) without level 1"));
    assert!(refused(|it| it.from = Some([].into())).contains("no node may use"));
    assert!(refused(|it| it.from = Some([B].into())).contains("can't fence itself"));
    assert!(refused(|it| it.action_limit_s = 0).contains("an action"));
    assert!(refused(|it| it.verify_limit_s = 601).contains("the verification"));
    assert!(refused(|it| it.check_every_s = 9).contains("check every 9 s"));
    assert!(refused(|it| it.targets.get_mut(&B).unwrap().delay_ms = 600_001).contains("too long"));
    assert!(
        refused(|it| {
            it.kind = FenceKind::Person;
        })
        .contains("takes no parameters")
    );
}

#[test]
fn levels_have_no_gap_and_a_person_decides_alone() {
    let mut state = cluster();
    add(&mut state, device("bmc", &[(B, 1)])).unwrap();
    add(&mut state, device("strip1", &[(B, 2)])).unwrap();
    add(&mut state, device("strip2", &[(B, 2)])).unwrap();
    let person = |level| FenceDevice {
        kind: FenceKind::Person,
        parameters: BTreeMap::new(),
        ..device("someone", &[(B, level)])
    };
    let shared = add(&mut state, person(2)).unwrap_err().to_string();
    assert!(shared.contains("a person decides alone"), "{shared}");
    add(&mut state, person(3)).unwrap();
    let mut remove = |name: &str| {
        state
            .apply(&Command::from(FenceCommand::RemoveDevice {
                name: name.to_owned(),
            }))
            .map_err(|e| e.to_string())
    };
    assert!(remove("bmc").unwrap_err().contains("without level 1"));
    remove("strip1").unwrap();
    // Changed in place: its level is never without it.
    let mut changed = device("bmc", &[(B, 1)]);
    changed.check_every_s = 60;
    let replace = |it: FenceDevice| Command::from(FenceCommand::ReplaceDevice(it));
    let gap = device("bmc", &[(B, 3)]);
    assert!(state.apply(&replace(gap)).is_err());
    let unknown = device("bcm", &[(B, 1)]);
    assert!(state.apply(&replace(unknown)).is_err());
    state.apply(&replace(changed)).unwrap();
    assert_eq!(state.fencing.devices["bmc"].check_every_s, 60);
    let mut remove = |name: &str| {
        state
            .apply(&Command::from(FenceCommand::RemoveDevice {
                name: name.to_owned(),
            }))
            .map_err(|e| e.to_string())
    };
    assert!(remove("strip2").unwrap_err().contains("without level 2"));
    remove("someone").unwrap();
    remove("strip2").unwrap();
    remove("bmc").unwrap();
}

#[test]
fn a_node_that_leaves_takes_its_part_of_the_devices_with_it() {
    let mut state = cluster();
    add(&mut state, device("bmc", &[(B, 1)])).unwrap();
    let mut shared = device("strip", &[(A, 1), (B, 2)]);
    shared.from = Some([A, B, W].into());
    add(&mut state, shared).unwrap();
    let expect = state.voters_version;
    state
        .apply(&Command::RemoveNode { node: B, expect })
        .unwrap();
    assert!(!state.fencing.devices.contains_key("bmc"));
    let strip = &state.fencing.devices["strip"];
    assert!(strip.targets.keys().eq([&A]));
    assert_eq!(strip.from, Some([A, W].into()));
}

#[test]
fn the_history_is_bounded_and_an_attempt_is_in_it_once() {
    let mut state = cluster();
    let record = |begun: u64, ended: Option<u64>| FenceRecord {
        node: B,
        name: "b".to_owned(),
        by: A,
        asked: FenceAsked::Person("root".to_owned()),
        action: FenceAction::Off,
        begun_unix_ms: begun,
        ended_unix_ms: ended,
        outcome: FenceOutcome::Proved(FenceProof {
            node: B,
            generation: LeaseGeneration(1),
            by: A,
            unix_ms: begun + 1,
            how: FenceEvidence::Person {
                who: "root".to_owned(),
                on: A,
            },
        }),
        remarks: vec!["ä".repeat(2000); 40],
    };
    let mut add = |it: FenceRecord| {
        state
            .apply(&Command::from(FenceCommand::Record(it)))
            .unwrap();
        state.fencing.history.clone()
    };
    add(record(1, None));
    let history = add(record(1, Some(9)));
    assert_eq!(history.len(), 1);
    let history_late = add(record(1, None));
    assert_eq!(history_late, history, "an end was taken back");
    assert!(history[0].remarks.len() <= 16);
    assert!(
        history[0]
            .remarks
            .iter()
            .all(|it| it.chars().count() <= 510)
    );
    for begun in 2..200 {
        add(record(begun, Some(begun)));
    }
    let history = add(record(200, None));
    assert_eq!(history.len(), FENCE_HISTORY_MAX);
    assert_eq!(history.last().unwrap().begun_unix_ms, 200);
}

#[test]
fn a_secret_is_not_in_what_is_printed() {
    let printed = format!("{:?}", FenceCommand::AddDevice(device("bmc", &[(B, 1)])));
    assert!(printed.contains("10.0.0.9"), "{printed}");
    assert!(!printed.contains("sesame"), "{printed}");
    let value = FenceValue::Secret("sesame".to_owned());
    assert!(!format!("{value}").contains("sesame"));
}
