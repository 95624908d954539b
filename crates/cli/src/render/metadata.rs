//! The metadata of a replica as lines.

use std::fmt::Write as _;

use relevo_server::api::{ActivityLogDump, BitmapDump, MetadataDump, SuperblockDump};
use relevo_types::size::format_size;

/// Regions that are named; of more there is a count.
const REGIONS_NAMED: usize = 16;

/// What is on a backing.
#[must_use]
pub fn metadata(dump: &MetadataDump) -> String {
    let mut text = format!(
        "{}: metadata on {} ({}), {}\n",
        dump.volume,
        dump.backing.display(),
        format_size(dump.backing_bytes),
        state(&dump.state),
    );
    for slot in &dump.superblocks {
        let what = match (&slot.problem, slot.generation) {
            (Some(problem), _) => format!("not usable: {problem}"),
            (None, generation) => format!("generation {}", generation.unwrap_or_default()),
        };
        let force = if slot.in_force { ", in force" } else { "" };
        line(
            &mut text,
            &format!("superblock {}", slot.slot),
            &format!("{what}{force}"),
        );
    }
    if let Some(superblock) = &dump.superblock {
        superblock_lines(&mut text, superblock);
    }
    if let Some(log) = &dump.activity_log {
        line(&mut text, "activity log", &activity_log(log));
    }
    for bitmap in &dump.bitmaps {
        line(
            &mut text,
            &format!("bitmap {}", bitmap.slot),
            &bitmap_words(bitmap),
        );
    }
    for problem in &dump.problems {
        line(&mut text, "problem", problem);
    }
    text
}

fn state(word: &str) -> &str {
    match word {
        "attached" => "attached: the daemon's memory may be ahead of this",
        "no daemon" => "no daemon runs",
        other => other,
    }
}

fn line(text: &mut String, label: &str, words: &str) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "  {label:<13} {words}");
}

fn superblock_lines(text: &mut String, superblock: &SuperblockDump) {
    let SuperblockDump {
        cluster,
        volume,
        node,
        slot,
        ..
    } = superblock;
    let whose = format!("volume {volume}, node {node}, slot {slot}, of cluster {cluster}");
    line(text, "replica", &whose);
    line(text, "data", &format_size(superblock.data_bytes));
    line(text, "lineage", &superblock.lineage);
    line(text, "epoch", &superblock.epoch.to_string());
    let flags = [
        (superblock.clean, "clean"),
        (superblock.certain, "certain"),
        (superblock.inconsistent, "inconsistent"),
        (superblock.blank, "blank"),
    ];
    let set: Vec<&str> = flags
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect();
    let flags = if set.is_empty() {
        "none (in use, or it ended uncleanly)".to_owned()
    } else {
        set.join(", ")
    };
    line(text, "flags", &flags);
}

fn activity_log(log: &ActivityLogDump) -> String {
    let mut words = format!("transaction {}, ", log.transaction);
    match log.regions.len() {
        0 => words += "no region active",
        count => {
            let named: Vec<String> = log
                .regions
                .iter()
                .take(REGIONS_NAMED)
                .map(u32::to_string)
                .collect();
            let more = if count > REGIONS_NAMED { " ..." } else { "" };
            words += &format!(
                "{count} regions of {} active: {}{more}",
                format_size(log.region_bytes),
                named.join(" ")
            );
        }
    }
    if log.uncertain_bytes > 0 {
        words += &format!(
            "; the next attach takes {} for uncertain",
            format_size(log.uncertain_bytes)
        );
    }
    if log.damaged > 0 {
        words += &format!("; {} damaged blocks", log.damaged);
    }
    words
}

fn bitmap_words(bitmap: &BitmapDump) -> String {
    let whose = match (&bitmap.node, bitmap.own) {
        (Some(node), true) => format!("{node}, its own: "),
        (Some(node), false) => format!("{node}: "),
        (None, true) => "its own: ".to_owned(),
        (None, false) => String::new(),
    };
    let mut words = whose;
    if bitmap.dirty_blocks == 0 {
        words += "nothing dirty";
    } else {
        let named: Vec<String> = bitmap
            .first_runs
            .iter()
            .map(|(first, count)| match count {
                1 => first.to_string(),
                count => format!("{first}-{}", first + count - 1),
            })
            .collect();
        let more = if bitmap.runs > named.len() as u64 {
            " ..."
        } else {
            ""
        };
        words += &format!(
            "{} dirty, {} blocks in {} runs: {}{more}",
            format_size(bitmap.dirty_bytes),
            bitmap.dirty_blocks,
            bitmap.runs,
            named.join(" ")
        );
    }
    if bitmap.pages_damaged > 0 {
        words += &format!(
            "; {} of {} written pages damaged",
            bitmap.pages_damaged, bitmap.pages_written
        );
    }
    words
}
