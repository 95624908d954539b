//! nbdinfo and qemu-nbd tell what the server says of itself.

use serde_json::Value;

use crate::{
    subject::{EXPORT, Subject},
    tools::{judge, missing, run},
};

const SIZE: usize = 8 << 20;

fn json(arguments: &[&str]) -> Value {
    serde_json::from_slice(&judge("nbdinfo", arguments).stdout).unwrap()
}

#[test]
fn nbdinfo_describes_the_export() {
    if missing("nbdinfo_describes_the_export", "nbdinfo") {
        return;
    }
    let subject = Subject::start(SIZE);
    let info = json(&["--json", &subject.uri()]);
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], EXPORT);
    assert_eq!(export["description"], "volume mail");
    assert_eq!(export["export-size"], SIZE);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for able in [
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_df",
        "can_multi_conn",
    ] {
        assert_eq!(export[able], true, "{able}");
    }
    for not in [
        "is_read_only",
        "can_fast_zero",
        "can_cache",
        "is_rotational",
    ] {
        assert_eq!(export[not], false, "{not}");
    }
    assert_eq!(export["block_size_minimum"], 4096);
    assert_eq!(export["block_size_maximum"], 32 << 20);

    let frozen = json(&["--json", &subject.uri_of("frozen")]);
    assert_eq!(frozen["exports"][0]["is_read_only"], true);
}

#[test]
fn the_reason_of_a_refusal_is_shown() {
    const TEST: &str = "the_reason_of_a_refusal_is_shown";
    if missing(TEST, "nbdinfo") || missing(TEST, "qemu-img") {
        return;
    }
    let subject = Subject::start(SIZE);
    for (export, reason) in [
        ("wiki", "web1 is primary of wiki, not this node"),
        ("none", "there is no volume `none`"),
    ] {
        let output = run("nbdinfo", &[&subject.uri_of(export)]);
        assert!(!output.status.success());
        // nbdinfo keeps the server's words for its debug mode; QEMU shows them.
        let output = run("qemu-img", &["info", &subject.uri_of(export)]);
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains(reason), "{words}");
    }
}

#[test]
fn nbdinfo_lists_and_maps() {
    if missing("nbdinfo_lists_and_maps", "nbdinfo") {
        return;
    }
    let subject = Subject::start(SIZE);
    let map = json(&["--map", "--json", &subject.uri()]);
    let all = serde_json::json!([
        {"offset": 0, "length": SIZE, "type": 3, "description": "hole,zero"}
    ]);
    assert_eq!(map, all);
    let list = json(&["--list", "--json", &subject.uri_of("")]);
    let names: Vec<_> = list["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| &export["export-name"])
        .collect();
    assert_eq!(names, [EXPORT, "frozen"]);
}

#[test]
fn qemu_nbd_lists_the_exports() {
    if missing("qemu_nbd_lists_the_exports", "qemu-nbd") {
        return;
    }
    let subject = Subject::start(SIZE);
    let socket = subject.socket().display().to_string();
    let output = judge("qemu-nbd", &["--list", "-k", &socket]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("export: 'mail'"), "{text}");
    assert!(text.contains("base:allocation"), "{text}");
    assert!(text.contains("min block: 4096"), "{text}");
}
