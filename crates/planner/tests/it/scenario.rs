//! Golden scenarios: `tests/scenarios/NAME/scenario.toml` says what happens, `expect.log` what the
//! planner made of it. `RELEVO_BLESS=1 cargo test -p relevo-planner` writes the logs anew; read
//! the difference before committing it.

use std::{fmt::Write as _, fs, path::Path};

use serde::Deserialize;

use crate::world::World;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    /// What this is about, in a sentence.
    story: String,
    /// Names; `w:witness` for a witness, `a:8000` for memory in MiB. The last one plans.
    nodes: Vec<String>,
    #[serde(default)]
    volumes: Vec<VolumeLine>,
    services: Vec<ServiceLine>,
    /// Moments, each with lines that happen together; then the planner settles.
    #[serde(default)]
    moments: Vec<Moment>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VolumeLine {
    name: String,
    replicas: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceLine {
    name: String,
    #[serde(default)]
    volumes: Vec<String>,
    /// Rules of its placement: `prefer a b`, `with mail`, `memory 4096`.
    #[serde(default)]
    place: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Moment {
    what: String,
    lines: Vec<String>,
}

fn strs(list: &[String]) -> Vec<&str> {
    list.iter().map(String::as_str).collect()
}

fn play(text: &str) -> String {
    let scenario: Scenario = toml::from_str(text).unwrap();
    let mut world = World::new(&strs(&scenario.nodes));
    for volume in &scenario.volumes {
        world.add_volume(&volume.name, &strs(&volume.replicas));
    }
    for service in &scenario.services {
        world.add_service(
            &service.name,
            &strs(&service.volumes),
            &strs(&service.place),
        );
    }
    writeln!(world.log, "{}\n\nstart", scenario.story).unwrap();
    world.settle();
    for moment in &scenario.moments {
        writeln!(world.log, "\n{}", moment.what).unwrap();
        for line in &moment.lines {
            writeln!(world.log, "  > {line}").unwrap();
            world.step(line);
        }
        world.settle();
    }
    world.log
}

#[test]
fn golden_scenarios() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let bless = std::env::var_os("RELEVO_BLESS").is_some();
    let mut names: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert!(names.len() >= 60, "scenarios are missing from {root:?}");
    let mut wrong = Vec::new();
    for name in names {
        let folder = root.join(&name);
        let text = fs::read_to_string(folder.join("scenario.toml")).unwrap();
        let log = play(&text);
        let expect = folder.join("expect.log");
        if bless {
            fs::write(&expect, &log).unwrap();
        } else if fs::read_to_string(&expect).unwrap_or_default() != log {
            wrong.push(format!("{name:?} gives:\n{log}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\nIf this is what should happen, bless it with RELEVO_BLESS=1.",
        wrong.join("\n")
    );
}
