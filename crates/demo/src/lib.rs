//! `relevo demo`: builds a real cluster on this machine, runs a service on it, pulls plugs, and
//! reports how long clients waited and whether anything was lost. `relevo bench` measures on the
//! same kind of cluster.
//!
//! It starts daemons and clients as processes of the same binary and drives them only through the
//! API that the command line uses. It owns everything it makes: namespaces without names,
//! processes that die with it, one temporary directory.
//!
//! * [`lab`]: machines, cables, daemons.
//! * [`scenes`]: what is done to them, and what is checked.
//! * [`report`]: the table and the JSON.

mod api;
pub mod bench;
mod interrupt;
pub mod lab;
mod ledger;
mod progress;
pub mod report;
pub mod scenes;

use std::process::ExitCode;

use clap::Args;

use crate::{
    lab::{Lab, Surroundings},
    progress::Progress,
    report::Report,
    scenes::{SCENES, Stage},
};

/// How `relevo demo` is called.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Run only this scene (may be repeated): power-loss, return, process-kill, service-crash,
    /// switchover, partition, replication-cut, witness-loss
    #[arg(long, value_name = "NAME")]
    pub scene: Vec<String>,

    /// Run the scenes this many times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,

    /// Leave the cluster up after the scenes and say how to reach it, until interrupted
    #[arg(long)]
    pub keep: bool,

    /// Where to build the cluster; by default the best that this machine allows
    #[arg(long, value_enum, value_name = "WHERE")]
    pub surroundings: Option<Surroundings>,
}

/// Runs the demo; `json`: print one JSON object instead of the table. Must be called before the process has a second thread: a process with threads
/// can't enter a user namespace.
///
/// # Errors
/// What could not be built or done. What the scenes found is in the exit code: 0 when nothing was
/// lost and everything recovered, 1 otherwise.
pub fn run(args: &DemoArgs, json: bool) -> anyhow::Result<ExitCode> {
    for name in &args.scene {
        anyhow::ensure!(
            SCENES.iter().any(|scene| scene.name == name),
            "there is no scene `{name}`; the scenes are: {}",
            SCENES
                .iter()
                .map(|scene| scene.name)
                .collect::<Vec<_>>()
                .join(", ")
        );
    }
    let surroundings = lab::enter(args.surroundings)?;
    interrupt::install()?;
    let progress = Progress::new(json);
    let mut lab = Lab::build(surroundings, &progress)?;
    let report = perform(args, &mut lab, &progress)?;
    progress.finish();
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_report(&report);
    }
    if args.keep && !interrupt::requested() {
        lab.explain_how_to_reach();
        interrupt::wait();
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn perform(args: &DemoArgs, lab: &mut Lab, progress: &Progress) -> anyhow::Result<Report> {
    let mut stage = Stage::set(lab, progress)?;
    let mut scenes = Vec::new();
    'all: for run in 1..=args.repeat {
        for scene in SCENES {
            let wanted = args.scene.is_empty() || args.scene.iter().any(|name| name == scene.name);
            if !wanted || !stage.possible(scene) {
                continue;
            }
            scenes.push(stage.play(scene, run)?);
            if interrupt::requested() {
                break 'all;
            }
        }
    }
    let left_out = stage.left_out();
    let ok =
        !scenes.is_empty() && scenes.iter().all(report::SceneReport::ok) && !interrupt::requested();
    Ok(Report {
        surroundings: stage.surroundings().to_owned(),
        left_out,
        scenes,
        ok,
    })
}

fn print_report(report: &Report) {
    println!("{}", report.table());
    for line in report.repetitions() {
        println!("{line}");
    }
    for scene in &report.scenes {
        for note in &scene.notes {
            println!("{}: {note}", scene.name);
        }
        for failure in &scene.failures {
            println!("{}: FAILED: {failure}", scene.name);
        }
    }
    for left_out in &report.left_out {
        println!("left out: {left_out}");
    }
    let total: u64 = report.scenes.iter().map(|scene| scene.acknowledged).sum();
    let missing: u64 = report.scenes.iter().map(|scene| scene.missing).sum();
    if report.ok {
        println!("{total} entries were acknowledged; none is missing.");
    } else {
        println!(
            "{total} entries were acknowledged; {missing} are missing. Something is wrong; see above."
        );
    }
}
