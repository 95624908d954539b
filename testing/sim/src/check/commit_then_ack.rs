//! Commit, then acknowledge (rules 1 and 2): when a write is acknowledged, every member of the
//! in-sync set that is committed *at that moment* has it, or something newer in its place; durably
//! if a flush or FUA was acknowledged. Looked up on the disks themselves.

use bytes::Bytes;
use relevo_types::{
    BlockRange, NodeId,
    cluster::{Protocol, Volume},
};

use super::{Verdict, Violation, linear::History, linear::Tick};
use crate::{
    disk::Disk,
    stamp::{SECTORS_PER_BLOCK, WriteNo, read_block},
};

const RULE: &str =
    "a write is acknowledged when every committed in-sync replica has it (rules 1, 2)";

/// A replica as the checker sees it.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaView<'a> {
    /// Where.
    pub node: NodeId,
    /// Its bytes.
    pub disk: &'a Disk,
    /// When it last lost power without having been resynced since.
    pub lost_power: Option<Tick>,
    /// What its process received and has not written.
    pub received: &'a [BlockRange],
}

/// Checks a write that is acknowledged now, by a node that may be evicted already. A replica of protocol B may have only received it, while
/// its process lives.
///
/// # Errors
/// A member of the in-sync set lacks it.
pub fn write(
    volume: &Volume,
    by: NodeId,
    replicas: &[ReplicaView<'_>],
    history: &History,
    number: WriteNo,
    durable: bool,
) -> Verdict {
    // What was found well: two replicas mostly have one write in one place in memory.
    let mut seen: Vec<(u64, *const u8)> = Vec::new();
    for replica in members(volume, replicas) {
        // It had the write and lost it with the power: allowed until a flush.
        let excused = replica
            .lost_power
            .is_some_and(|lost| lost > history.write(number).invoked);
        if excused && !durable {
            continue;
        }
        let protocol = volume.protocol(by, replica.node);
        let by_receipt = protocol == Protocol::B && !durable;
        for block in history.write(number).blocks.iter() {
            let received = |run: &BlockRange| run.first <= block && block < run.end();
            if by_receipt && replica.received.iter().any(received) {
                continue;
            }
            let page = content(replica, block, durable);
            let place = page.map(|page| (block, page.as_ptr()));
            if place.is_some_and(|place| seen.contains(&place)) {
                continue;
            }
            has(replica, history, block, number, durable, "acknowledged")?;
            seen.extend(place);
        }
    }
    Ok(())
}

/// Checks a flush that began at `invoked` and is acknowledged now.
///
/// # Errors
/// A member of the in-sync set lacks a write that the flush covers.
pub fn flush(
    volume: &Volume,
    replicas: &[ReplicaView<'_>],
    history: &History,
    invoked: Tick,
) -> Verdict {
    for replica in members(volume, replicas) {
        for (number, write) in history.unflushed() {
            let covered = history.is_after_cuts(write)
                && write.acked
                && !write.flushed
                && write.ended.is_some_and(|end| end < invoked);
            // Gone before the flush began: it can't cover what nobody has any more.
            let excused = replica
                .lost_power
                .is_some_and(|lost| lost > write.invoked && lost < invoked);
            if !covered || excused {
                continue;
            }
            for block in write.blocks.iter() {
                has(replica, history, block, number, true, "flushed")?;
            }
        }
    }
    Ok(())
}

fn members<'a, 'b>(
    volume: &'b Volume,
    replicas: &'b [ReplicaView<'a>],
) -> impl Iterator<Item = &'b ReplicaView<'a>> {
    replicas
        .iter()
        .filter(|replica| volume.in_sync.contains(&replica.node))
}

fn content<'a>(replica: &ReplicaView<'a>, block: u64, durable: bool) -> Option<&'a Bytes> {
    if durable {
        replica.disk.durable_block(block)
    } else {
        replica.disk.block(block)
    }
}

fn has(
    replica: &ReplicaView<'_>,
    history: &History,
    block: u64,
    number: WriteNo,
    durable: bool,
    promise: &str,
) -> Verdict {
    let node = replica.node;
    let found = match content(replica, block, durable) {
        Some(bytes) => read_block(block, bytes)
            .map_err(|what| Violation::new(RULE, format!("on {node}: {what}")))?,
        None => [WriteNo::ZERO; SECTORS_PER_BLOCK],
    };
    for (sector, found) in found.into_iter().enumerate() {
        if !history.same_or_newer(block, found, number) {
            let place = if durable {
                "on stable storage"
            } else {
                "on its disk"
            };
            return Err(Violation::new(
                RULE,
                format!(
                    "write {} was {promise}, but {node}, in the committed in-sync set, has write {} in block {block} sector {sector} {place}",
                    number.0, found.0
                ),
            ));
        }
    }
    Ok(())
}
