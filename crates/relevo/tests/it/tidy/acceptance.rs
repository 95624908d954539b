//! `docs/acceptance.md` names LINBIT's tests and what covers them here: no name may be missing, and
//! nothing may be named that does not exist.

use std::{collections::BTreeSet, fs, path::Path};

use super::root;

/// Scripts in drbd9-tests.
const LINBIT_TESTS: usize = 143;

/// How a cell begins that names no test.
const WITHOUT_A_TEST: [&str; 3] = ["not yet: ", "later: ", "can't apply: "];

/// Functions that are marked as tests, of the whole tree. Inside `proptest!` they are too.
fn tests(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            tests(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            for piece in text.split("test]\n").chain(text.split("test(")).skip(1) {
                // Other attributes may stand between; a function's name ends at its parenthesis.
                let head = piece.split('{').next().unwrap_or_default();
                let Some((_, rest)) = head.rsplit_once("fn ") else {
                    continue;
                };
                found.insert(rest.split('(').next().unwrap_or_default().to_owned());
            }
        }
    }
}

/// What stands between each pair of marks.
fn between(text: &str, mark: char) -> Vec<&str> {
    text.split(mark).skip(1).step_by(2).collect()
}

#[test]
fn every_linbit_test_has_its_answer() {
    let root = root();
    let mut known = BTreeSet::new();
    for directory in ["crates", "testing"] {
        tests(&root.join(directory), &mut known);
    }
    let coverage = fs::read_to_string(root.join("testing/sim/src/coverage.rs")).unwrap();
    let marks = coverage.split("];").next().unwrap();

    let table = fs::read_to_string(root.join("docs/acceptance.md")).unwrap();
    let rows: Vec<(&str, &str)> = table
        .lines()
        .filter_map(|line| {
            line.strip_prefix("| ")?
                .strip_suffix(" |")?
                .split_once(" | ")
        })
        .filter(|(name, _)| *name != "LINBIT's test")
        .collect();
    let names: BTreeSet<&str> = rows.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), rows.len(), "a name stands there twice");
    assert_eq!(names.len(), LINBIT_TESTS);

    for (name, answer) in rows {
        let mut cited = 0;
        // Verbs and options are set in code too; tests have underscores.
        for test in between(answer, '`') {
            if test.contains('_') {
                assert!(known.contains(test), "{name}: there is no test `{test}`");
                cited += 1;
            }
        }
        for mark in between(answer, '"') {
            let quoted = format!("\"{mark}\",");
            assert!(marks.contains(&quoted), "{name}: no mark \"{mark}\"");
            cited += 1;
        }
        let explained = WITHOUT_A_TEST.iter().any(|how| answer.starts_with(how));
        assert!(cited > 0 || explained, "{name} has no answer: {answer}");
    }
}
