//! What people are told of the things that happen to a volume.

use relevo_replication::{SplitBrain, VolumeEvent};
use relevo_types::NodeId;

use crate::{api::EventLevel, status::side_words};

/// An event in words; `None` if it is told otherwise.
pub(super) fn of_event(
    event: &VolumeEvent,
    volume: &str,
    node: impl Fn(NodeId) -> String,
) -> Option<(EventLevel, String)> {
    Some(match event {
        VolumeEvent::Attached { clean, remark } => {
            let how = if *clean { "" } else { " after an unclean stop" };
            match remark {
                None => (EventLevel::Info, format!("attached{how}")),
                Some(remark) => (EventLevel::Warning, format!("attached{how}: {remark}")),
            }
        }
        VolumeEvent::Detached => (EventLevel::Info, "detached".to_owned()),
        VolumeEvent::DiskFailed { reason } => {
            (EventLevel::Alarm, format!("its disk here failed: {reason}"))
        }
        VolumeEvent::Opened { epoch } => (
            EventLevel::Info,
            format!("open here as primary at epoch {epoch}"),
        ),
        VolumeEvent::Tends { epoch } => (
            EventLevel::Info,
            format!(
                "nobody uses it: the other replicas are brought up to date from here, at epoch {epoch}"
            ),
        ),
        VolumeEvent::Closed { reason } => (EventLevel::Info, format!("closed here: {reason}")),
        VolumeEvent::Verified { node: of, .. } => verified_words(&node(*of), event),
        VolumeEvent::Healed {
            blocks,
            from,
            error,
        } => {
            let from = node(*from);
            let range = blocks.bytes();
            let text = format!(
                "its disk here can't read {} bytes at {} ({error}); they were read from {from} and are written anew. Look at the disk",
                range.len, range.offset
            );
            (EventLevel::Warning, text)
        }
        VolumeEvent::Unreadable { blocks, error } => {
            let range = blocks.bytes();
            let text = format!(
                "its disk here can't read all of {} bytes at {} ({error}): they count as different, and a repair writes them anew. Look at the disk",
                range.len, range.offset
            );
            (EventLevel::Warning, text)
        }
        VolumeEvent::SplitBrain { peer, split } => {
            (EventLevel::Alarm, split_words(volume, &node(*peer), split))
        }
        VolumeEvent::GaveWay { to, saved } => {
            let to = node(*to);
            let text = format!(
                "this replica gives way to the one on {to}: {saved} blocks of 4 KiB that only it had were saved (`relevo volume saved`)"
            );
            (EventLevel::Warning, text)
        }
        // Told as a change of state.
        VolumeEvent::Peer { .. } => return None,
    })
}

/// What a person is told of two histories that met.
fn split_words(volume: &str, peer: &str, split: &SplitBrain) -> String {
    format!(
        "split brain with {peer}: only this replica has {}, only that one has {}; {}; until then nothing is replicated between the two. `relevo volume resolve {volume} --keep NODE` decides; what only the other one has is saved before it is overwritten",
        side_words(split.ours),
        side_words(split.theirs),
        split.why
    )
}

/// Runs of blocks that a message names; the others are only counted.
const RUNS_TOLD: usize = 8;

/// What a person is told of a verification that ended.
fn verified_words(node: &str, event: &VolumeEvent) -> (EventLevel, String) {
    let VolumeEvent::Verified {
        checked,
        differing,
        stopped,
        repair,
        ..
    } = event
    else {
        return (EventLevel::Info, String::new());
    };
    let looked_at = match stopped {
        None => format!("the replica on {node} was compared with this one"),
        Some(why) => format!(
            "the comparison with the replica on {node} ended after {} MiB: {why}",
            (checked * relevo_types::BLOCK_SIZE) >> 20
        ),
    };
    if differing.is_empty() {
        return (EventLevel::Info, format!("{looked_at}: no difference"));
    }
    let blocks: u64 = differing.iter().map(|run| run.count).sum();
    let mut places: Vec<String> = differing
        .iter()
        .take(RUNS_TOLD)
        .map(|run| format!("{}+{}", run.bytes().offset, run.bytes().len))
        .collect();
    if differing.len() > RUNS_TOLD {
        places.push(format!("and {} more places", differing.len() - RUNS_TOLD));
    }
    let next = if *repair {
        "it leaves the in-sync set and gets these blocks from here"
    } else {
        "nothing was changed, and which of the two is right is not known; `relevo verify --repair` copies what differs from here, and until then other replicas are preferred to that one"
    };
    let text = format!(
        "{looked_at}: {blocks} blocks of 4 KiB differ, at bytes {}: one of the two disks altered data by itself; {next}",
        places.join(", ")
    );
    (EventLevel::Alarm, text)
}
