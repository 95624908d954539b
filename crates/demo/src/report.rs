//! What the demo found, as a table for people and one object for programs.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// Everything one run of the demo found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How the machines were made: `namespaces`, `user namespaces` or `loopback`.
    pub surroundings: String,
    /// What was left out there, and why. Empty when nothing was.
    pub left_out: Vec<String>,
    /// The scenes in the order they ran.
    pub scenes: Vec<SceneReport>,
    /// Nothing was lost and everything recovered.
    pub ok: bool,
}

/// What one scene found.
#[derive(Debug, Serialize)]
pub struct SceneReport {
    /// Name, as `--scene` takes it.
    pub name: String,
    /// Which of several repetitions, from 1.
    pub run: u32,
    /// The node that served before.
    pub active_before: String,
    /// The node that served after; empty when none did.
    pub active_after: String,
    /// The longest time between two acknowledged entries, in milliseconds.
    pub longest_gap_ms: u64,
    /// Entries acknowledged during the scene.
    pub acknowledged: u64,
    /// Entries acknowledged since the demo began that the service doesn't have. Must be 0.
    pub missing: u64,
    /// The service answered again and all replicas were in sync again within the bound.
    pub recovered: bool,
    /// The two replicas were equal, block by block; `None` when they could not be compared.
    pub replicas_equal: Option<bool>,
    /// How long until all replicas were in sync again, in milliseconds.
    pub healed_ms: u64,
    /// What else was checked or seen, in sentences.
    pub notes: Vec<String>,
    /// What went wrong, in sentences. Empty when nothing did.
    pub failures: Vec<String>,
}

impl SceneReport {
    /// Nothing was lost, everything recovered, and every check held.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.missing == 0
            && self.recovered
            && self.replicas_equal != Some(false)
            && self.failures.is_empty()
    }
}

impl Report {
    /// The table that the demo ends with.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_FULL_CONDENSED);
        table.set_header([
            "scene",
            "served by",
            "longest wait",
            "acknowledged",
            "missing",
            "in sync after",
            "replicas equal",
            "",
        ]);
        for scene in &self.scenes {
            let name = if scene.run > 1 {
                format!("{} ({})", scene.name, scene.run)
            } else {
                scene.name.clone()
            };
            let served = if scene.active_before == scene.active_after {
                scene.active_after.clone()
            } else {
                format!("{} → {}", scene.active_before, scene.active_after)
            };
            table.add_row([
                name,
                served,
                format!("{} ms", scene.longest_gap_ms),
                scene.acknowledged.to_string(),
                scene.missing.to_string(),
                if scene.recovered {
                    format!(
                        "{:.1} s",
                        Duration::from_millis(scene.healed_ms).as_secs_f64()
                    )
                } else {
                    "never".to_owned()
                },
                match scene.replicas_equal {
                    Some(true) => "yes".to_owned(),
                    Some(false) => "NO".to_owned(),
                    None => "not compared".to_owned(),
                },
                if scene.ok() {
                    "ok".to_owned()
                } else {
                    "FAILED".to_owned()
                },
            ]);
        }
        for column in 2..=5 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.to_string()
    }

    /// For each scene that ran more than once: median and longest wait.
    #[must_use]
    pub fn repetitions(&self) -> Vec<String> {
        let mut names: Vec<&str> = self
            .scenes
            .iter()
            .map(|scene| scene.name.as_str())
            .collect();
        names.sort_unstable();
        names.dedup();
        let mut lines = Vec::new();
        for name in names {
            let mut gaps: Vec<u64> = self
                .scenes
                .iter()
                .filter(|scene| scene.name == name)
                .map(|scene| scene.longest_gap_ms)
                .collect();
            if gaps.len() > 1 {
                gaps.sort_unstable();
                lines.push(format!(
                    "{name}: {} runs, longest wait min {} / median {} / max {} ms",
                    gaps.len(),
                    gaps[0],
                    gaps[gaps.len() / 2],
                    gaps[gaps.len() - 1],
                ));
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene(run: u32, gap: u64) -> SceneReport {
        SceneReport {
            name: "power-loss".to_owned(),
            run,
            active_before: "one".to_owned(),
            active_after: "two".to_owned(),
            longest_gap_ms: gap,
            acknowledged: 10,
            missing: 0,
            recovered: true,
            replicas_equal: Some(true),
            healed_ms: 1200,
            notes: Vec::new(),
            failures: Vec::new(),
        }
    }

    #[test]
    fn a_loss_or_an_unequal_replica_is_not_ok() {
        assert!(scene(1, 5).ok());
        assert!(
            !SceneReport {
                missing: 1,
                ..scene(1, 5)
            }
            .ok()
        );
        assert!(
            !SceneReport {
                replicas_equal: Some(false),
                ..scene(1, 5)
            }
            .ok()
        );
        assert!(
            !SceneReport {
                recovered: false,
                ..scene(1, 5)
            }
            .ok()
        );
        assert!(
            !SceneReport {
                failures: vec!["x".to_owned()],
                ..scene(1, 5)
            }
            .ok()
        );
    }

    #[test]
    fn the_table_names_the_scene_and_the_median_is_the_middle() {
        let report = Report {
            surroundings: "namespaces".to_owned(),
            left_out: Vec::new(),
            scenes: vec![scene(1, 900), scene(2, 1500), scene(3, 1200)],
            ok: true,
        };
        assert!(report.table().contains("one → two"));
        assert_eq!(
            report.repetitions(),
            ["power-loss: 3 runs, longest wait min 900 / median 1200 / max 1500 ms"]
        );
    }
}
