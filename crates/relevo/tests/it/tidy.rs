//! House rules as tests: the direction of dependencies, where `unsafe` may stand, what sans-IO
//! crates may not touch, how long a file may be, and that links in the documents lead somewhere.

mod acceptance;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Crates by layer; a crate may depend only on crates of earlier rows (docs/architecture.md).
const LAYERS: &[&[&str]] = &[
    &["types"],
    &["wire", "format"],
    &["replication", "membership", "planner"],
    &["node", "control", "disk", "export", "host"],
    &["transport", "agents", "fence", "ledger"],
    &["datapath"],
    &["server"],
    &["cli"],
    &["demo"],
    &["relevo"],
];

/// Crates that are state machines: no clock, thread, socket, random source or hash-map order.
const SANS_IO: &[&str] = &[
    "types",
    "wire",
    "format",
    "replication",
    "membership",
    "planner",
    "node",
];

/// Crates in which `unsafe` may stand.
const DRIVERS: &[&str] = &["disk", "host", "export"];

/// Longer files ask to be split at a concept.
const FILE_LINES_MAX: usize = 800;

fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest
        .ancestors()
        .nth(2)
        .expect("crates/relevo is two levels deep")
        .to_path_buf()
}

fn files(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory)
        .expect("a directory of the repository")
        .flatten()
    {
        let path = entry.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden || path.ends_with("target") {
            continue;
        }
        if path.is_dir() {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

fn sources(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    files(directory, "rs", &mut found);
    found.sort();
    found
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("source is UTF-8");
            (path, text)
        })
        .collect()
}

#[test]
fn arrows_go_only_downward() {
    let layer: BTreeMap<&str, usize> = LAYERS
        .iter()
        .enumerate()
        .flat_map(|(index, names)| names.iter().map(move |name| (*name, index)))
        .collect();
    for entry in fs::read_dir(root().join("crates"))
        .expect("crates/")
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let own = layer
            .get(name.as_str())
            .unwrap_or_else(|| panic!("{name} has no layer"));
        let manifest = fs::read_to_string(entry.path().join("Cargo.toml")).expect("Cargo.toml");
        let dependencies = manifest
            .split("[dependencies]")
            .nth(1)
            .unwrap_or("")
            .split("\n[")
            .next()
            .unwrap_or("");
        for line in dependencies.lines() {
            let Some(rest) = line.strip_prefix("relevo-") else {
                continue;
            };
            let target: String = rest
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '-')
                .collect();
            let theirs = layer
                .get(target.as_str())
                .unwrap_or_else(|| panic!("{target} has no layer"));
            assert!(
                theirs < own,
                "{name} depends on {target}, which is not below it"
            );
        }
    }
}

#[test]
fn sans_io_crates_touch_nothing() {
    let banned = [
        "std::net::Tcp",
        "std::net::Udp",
        "std::thread",
        "std::fs",
        "std::time::Instant",
        "std::time::SystemTime",
        "HashMap",
        "HashSet",
        "rand::",
        "tokio::",
    ];
    for name in SANS_IO {
        for (path, text) in sources(&root().join("crates").join(name).join("src")) {
            let code: String = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect::<Vec<_>>()
                .join("\n");
            for word in banned {
                assert!(!code.contains(word), "{} uses {word}", path.display());
            }
        }
    }
}

#[test]
fn unsafe_stands_only_in_drivers() {
    for entry in fs::read_dir(root().join("crates"))
        .expect("crates/")
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let manifest = fs::read_to_string(entry.path().join("Cargo.toml")).expect("Cargo.toml");
        let inherits = manifest.contains("[lints]\nworkspace = true");
        assert!(
            inherits || DRIVERS.contains(&name.as_str()),
            "{name} must inherit the workspace lints, which forbid unsafe code"
        );
    }
}

#[test]
fn files_are_short_enough_to_read() {
    for directory in ["crates", "testing"] {
        for (path, text) in sources(&root().join(directory)) {
            let lines = text.lines().count();
            assert!(
                lines <= FILE_LINES_MAX,
                "{} has {lines} lines; split it at a concept",
                path.display()
            );
        }
    }
}

#[test]
fn nothing_is_left_undone() {
    // Spelled in two halves so that this file does not find itself.
    let marks = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("#[ign", "ore"),
        concat!("db", "g!("),
    ];
    for directory in ["crates", "testing"] {
        for (path, text) in sources(&root().join(directory)) {
            // A test that another test runs in a process of its own is not left out.
            let lines = text.lines().filter(|line| !line.contains("= \"run by "));
            for line in lines {
                for mark in marks {
                    assert!(!line.contains(mark), "{} contains {mark}", path.display());
                }
            }
        }
    }
}

#[test]
fn test_modules_are_not_forgotten() {
    for directory in ["crates", "testing"] {
        let mut mains = Vec::new();
        files(&root().join(directory), "rs", &mut mains);
        for main in mains
            .iter()
            .filter(|path| path.ends_with("tests/it/main.rs"))
        {
            let text = fs::read_to_string(main).expect("source is UTF-8");
            let folder = main.parent().expect("tests/it");
            for entry in fs::read_dir(folder).expect("tests/it").flatten() {
                let path = entry.path();
                let Some(stem) = path
                    .file_stem()
                    .map(|stem| stem.to_string_lossy().into_owned())
                else {
                    continue;
                };
                if stem != "main" {
                    assert!(
                        text.contains(&format!("mod {stem};")),
                        "{} is not a module of {}",
                        path.display(),
                        main.display()
                    );
                }
            }
        }
    }
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut documents = Vec::new();
    files(&root(), "md", &mut documents);
    for document in documents {
        let text = fs::read_to_string(&document).expect("documents are UTF-8");
        for piece in text.split("](").skip(1) {
            let target = piece.split([')', '#']).next().unwrap_or("");
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = document.parent().expect("a file has a folder").join(target);
            assert!(path.exists(), "{} links to {target}", document.display());
        }
    }
}
