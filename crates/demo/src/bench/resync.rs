//! `relevo bench --resync`: what a replica that was away costs when it returns.
//!
//! The link to it is taken away, blocks spread over the whole volume are written, and the link comes back: the
//! time until it is in the in-sync set again, and what went over its network, should hang on what was written
//! and not on the size of the volume.

use std::{path::Path, process::ExitCode, time::Duration};

use comfy_table::{CellAlignment, Table, presets};
use relevo_export::nbd::{ClientError, NbdAddr, Op, Pipeline};
use relevo_server::api::OrderRequest;
use relevo_types::{BLOCK_SIZE, cluster::NodeKind, size::format_size};
use serde::Serialize;

use crate::{
    api::{all_in_sync, now, wait_for},
    interrupt,
    lab::{self, Lab},
    progress::Progress,
};

/// Size of the volume in bytes, unless told otherwise.
pub(super) const SIZE: u64 = 4 << 30;

/// Of 1000 blocks so many are written while the replica is away.
const SHARES: [u64; 4] = [0, 1, 10, 100];

/// A measured resync takes at most this long: a tenth of a terabyte on a slow disk.
const SYNC_BOUND: Duration = Duration::from_secs(600);

const WRITES_AT_ONCE: usize = 64;

const VOLUME: &str = "resync";

/// One return.
#[derive(Debug, Serialize)]
struct Row {
    /// What the replica lacked.
    dirty_bytes: u64,
    /// From the order to connect until it was in sync.
    seconds: f64,
    /// What arrived at it over the network of the replication meanwhile; `None` without namespaces.
    received_bytes: Option<u64>,
}

/// Measures and prints; `json`: one object instead of the table.
pub(super) fn run(
    directory: &Path,
    size: u64,
    tls: super::OnOff,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let surroundings = lab::enter(None)?;
    interrupt::install()?;
    let progress = Progress::new(json);
    let lab = Lab::build_in(directory, surroundings, NodeKind::Witness, &progress)?;
    let address = super::volume(&lab, VOLUME, size, &["one", "two"], tls)?;
    let mut rows = Vec::new();
    for share in SHARES {
        let blocks = size / BLOCK_SIZE * share / 1000;
        progress.step(format!("{blocks} blocks while `two` is away"));
        rows.push(measure(&lab, &address, size, blocks)?);
    }
    progress.finish();
    if json {
        let object = serde_json::json!({"size": size, "returns": rows});
        println!("{}", serde_json::to_string_pretty(&object)?);
    } else {
        println!("{}", table(size, &rows));
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(lab: &Lab, address: &NbdAddr, size: u64, blocks: u64) -> anyhow::Result<Row> {
    order(lab, &OrderRequest::Disconnect { node: None })?;
    wait_for(SYNC_BOUND, "`two` to leave the in-sync set", || {
        lab.volume(VOLUME)
            .filter(|volume| volume.in_sync == ["one"])
    })?;
    write(address, size, blocks)?;
    let before = lab.received_bytes("two", "repl")?;
    let began = now();
    order(lab, &OrderRequest::Connect { node: None })?;
    wait_for(SYNC_BOUND, "`two` to be in sync again", || {
        lab.volume(VOLUME).filter(all_in_sync)
    })?;
    let seconds = now().saturating_sub(began).as_secs_f64();
    let after = lab.received_bytes("two", "repl")?;
    Ok(Row {
        dirty_bytes: blocks * BLOCK_SIZE,
        seconds,
        received_bytes: after.zip(before).map(|(after, before)| after - before),
    })
}

/// An order to the replica on `two`.
fn order(lab: &Lab, request: &OrderRequest) -> anyhow::Result<()> {
    let state_dir = &lab.machine("two").state_dir;
    lab.api.call(state_dir, async |client| {
        client.order(VOLUME, request).await
    })?;
    Ok(())
}

/// Writes so many blocks, spread evenly over the volume, and flushes.
fn write(address: &NbdAddr, size: u64, blocks: u64) -> Result<(), ClientError> {
    let mut pipeline = Pipeline::connect(address, VOLUME, Some(super::REQUEST_BOUND))?;
    let mut data = vec![0xa5; 4096];
    let mut under_way = 0;
    for number in 0..blocks {
        if under_way == WRITES_AT_ONCE {
            pipeline.complete()?.result?;
            under_way -= 1;
        }
        // Neighbours never: they would go in one piece.
        let block = u128::from(size / BLOCK_SIZE) * u128::from(number) / u128::from(blocks);
        let offset = u64::try_from(block).unwrap_or(0) * BLOCK_SIZE;
        data[..8].copy_from_slice(&number.to_le_bytes());
        let op = Op::Write {
            offset,
            data: &data,
            fua: false,
        };
        pipeline.submit(op)?;
        under_way += 1;
    }
    pipeline.submit(Op::Flush)?;
    for _ in 0..=under_way {
        pipeline.complete()?.result?;
    }
    pipeline.disconnect()
}

fn table(size: u64, rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "of the volume".to_owned(),
        "the replica lacks".to_owned(),
        "in sync after s".to_owned(),
        "MiB/s".to_owned(),
        "received".to_owned(),
    ]);
    for row in rows {
        let dirty = row.dirty_bytes as f64;
        table.add_row([
            format!(
                "{:.1} % of {}",
                dirty / size as f64 * 100.0,
                format_size(size)
            ),
            format_size(row.dirty_bytes),
            format!("{:.2}", row.seconds),
            format!("{:.0}", dirty / f64::from(1 << 20) / row.seconds),
            row.received_bytes
                .map_or_else(|| "not known".to_owned(), format_size),
        ]);
    }
    for column in 0..=4 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}
