//! `relevo bench`: what replication costs, on one machine, in one run.
//!
//! Three nodes on loopback; a volume with one replica and a volume with two or three, both reached by
//! NBD on the same node, measured in turns of a slice each. Machines do other things too, so only the
//! ratio means much. Beside it a bare round trip on loopback: what a second replica can't do without.

mod resync;

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use relevo_export::{
    bench::{Bench, Measured, Pattern},
    nbd::client::NbdAddr,
};
use relevo_server::api::{CreateVolumeRequest, ReplicaRequest, SetOptionsRequest};
use relevo_types::cluster::{NodeKind, Protocol};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::{
    api::{all_in_sync, wait_for},
    interrupt,
    lab::{self, Lab, Surroundings},
    progress::Progress,
};

/// A volume opens within a second or two of being made primary.
const OPEN_BOUND: Duration = Duration::from_secs(20);

/// A request that takes longer has failed.
const REQUEST_BOUND: Duration = Duration::from_secs(10);

/// Size of the volumes in bytes.
const SIZE: u64 = 256 << 20;

/// How long each volume is measured before it is the other's turn.
const SLICE: Duration = Duration::from_millis(500);

/// Round trips measured, after a tenth as many that don't count.
const ROUND_TRIPS: usize = 5000;

/// Bytes there and back: a write of 4 KiB with its frame, and its acknowledgement.
const ROUND_TRIP_BYTES: (usize, usize) = (4096 + 67, 40);

const PATTERNS: [Pattern; 3] = [
    Pattern::RandomWrite4K { depth: 1 },
    Pattern::RandomWrite4K { depth: 32 },
    Pattern::SequentialWrite1M,
];

/// How `relevo bench` is called.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Measure each pattern on each volume for so many seconds
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,

    /// Size of the volumes [default: 256MiB, with --resync 4GiB]
    #[arg(long, value_name = "SIZE", value_parser = relevo_types::size::parse_size)]
    pub size: Option<u64>,

    /// Replicas of the replicated volume
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=3))]
    pub replicas: u8,

    /// Whether the data link between the replicas is encrypted (the volume's option `encryption`)
    #[arg(long, value_enum, default_value_t = OnOff::On)]
    pub tls: OnOff,

    /// Directory for the volumes, on the disk that shall be measured (or /dev/shm: in memory); by
    /// default the temporary directory (TMPDIR)
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,

    /// Measure instead how long a replica that was away takes to be in sync again, by how much it lacks
    #[arg(long, conflicts_with_all = ["seconds", "replicas"])]
    pub resync: bool,
}

/// A switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnOff {
    /// On.
    On,
    /// Off.
    Off,
}

/// One pattern on both volumes.
#[derive(Debug, Serialize)]
struct Row {
    pattern: String,
    local: Figures,
    replicated: Figures,
    /// Replicated to local: operations a second.
    iops_ratio: f64,
    /// Replicated minus local: median latency in microseconds.
    p50_added_us: f64,
}

#[derive(Debug, Serialize)]
struct Figures {
    iops: f64,
    mib_s: f64,
    p50_us: f64,
    p99_us: f64,
    /// Processor time of the primary's daemon for one operation, in microseconds.
    primary_cpu_us: f64,
}

impl Figures {
    fn new(measured: Measured, cpu: Duration) -> Self {
        let Measured {
            requests,
            iops,
            mib_s,
            p50_us,
            p99_us,
        } = measured;
        Self {
            iops,
            mib_s,
            p50_us,
            p99_us,
            primary_cpu_us: cpu.as_secs_f64() * 1e6 / requests.max(1) as f64,
        }
    }
}

/// Measures and prints; `json`: one object instead of the table.
///
/// # Errors
/// The cluster could not be built, or a request failed.
pub fn run(args: &BenchArgs, json: bool) -> anyhow::Result<ExitCode> {
    let directory = args.directory.clone().unwrap_or_else(std::env::temp_dir);
    if args.resync {
        return resync::run(
            &directory,
            args.size.unwrap_or(resync::SIZE),
            args.tls,
            json,
        );
    }
    let size = args.size.unwrap_or(SIZE);
    let surroundings = lab::enter(Some(Surroundings::Loopback))?;
    interrupt::install()?;
    let progress = Progress::new(json);
    let third = match args.replicas {
        3 => NodeKind::Data,
        _ => NodeKind::Witness,
    };
    let lab = Lab::build_in(&directory, surroundings, third, &progress)?;
    let nodes = &["one", "two", "three"][..usize::from(args.replicas).clamp(2, 3)];
    let local = volume(&lab, "local", size, &nodes[..1], OnOff::On)?;
    let replicated = volume(&lab, "replicated", size, nodes, args.tls)?;
    let round_trip_us = round_trip_us()?;
    let mut rows = Vec::new();
    for pattern in PATTERNS {
        progress.step(pattern.title());
        rows.push(measure(&lab, pattern, args.seconds, &local, &replicated)?);
    }
    progress.finish();
    if json {
        let object = serde_json::json!({
            "protocol": "C",
            "replicas": args.replicas,
            "tls": args.tls,
            "round_trip_us": round_trip_us,
            "patterns": rows,
        });
        println!("{}", serde_json::to_string_pretty(&object)?);
    } else {
        println!("{}", table(args.replicas, &rows));
        if args.tls == OnOff::Off {
            println!("between the replicas: no encryption");
        }
        println!("a round trip on loopback alone: {round_trip_us:.0} µs (median)");
    }
    Ok(ExitCode::SUCCESS)
}

/// Creates a volume, makes node `one` its primary and gives its NBD socket.
fn volume(lab: &Lab, name: &str, size: u64, nodes: &[&str], tls: OnOff) -> anyhow::Result<NbdAddr> {
    let state_dir = &lab.machine("one").state_dir;
    let replica = |node: &&str| ReplicaRequest {
        node: (*node).to_owned(),
        backing: None,
        protocol: Protocol::C,
    };
    let request = CreateVolumeRequest {
        name: name.to_owned(),
        size,
        replicas: nodes.iter().map(replica).collect(),
        force: false,
    };
    lab.api.call(state_dir, async |client| {
        client.create_volume(&request).await
    })?;
    if tls == OnOff::Off {
        let request = SetOptionsRequest {
            options: vec![("encryption".to_owned(), "off".to_owned())],
        };
        lab.api.call(state_dir, async |client| {
            client.set_options(name, &request).await
        })?;
    }
    lab.api
        .call(state_dir, async |client| client.make_primary(name).await)?;
    let socket = wait_for(OPEN_BOUND, &format!("volume `{name}` to open"), || {
        let cluster = lab.api.cluster(state_dir)?;
        let volume = cluster
            .volumes
            .into_iter()
            .find(|volume| volume.name == name)?;
        volume.nbd.clone().filter(|_| all_in_sync(&volume))
    })?;
    Ok(NbdAddr::Unix(socket))
}

fn measure(
    lab: &Lab,
    pattern: Pattern,
    seconds: u64,
    local: &NbdAddr,
    replicated: &NbdAddr,
) -> anyhow::Result<Row> {
    let open = |address: &NbdAddr, name: &str| {
        Bench::open(address, name, pattern, REQUEST_BOUND)
            .with_context(|| format!("open volume `{name}` at {address}"))
    };
    let (mut one, mut two) = (open(local, "local")?, open(replicated, "replicated")?);
    let rounds = (Duration::from_secs(seconds).as_millis() / SLICE.as_millis()).max(1);
    // One round that does not count: regions become hot, files get their blocks.
    one.run(SLICE)?;
    two.run(SLICE)?;
    one.forget();
    two.forget();
    let mut cpu = [Duration::ZERO; 2];
    for _ in 0..rounds {
        interrupt::check()?;
        for (bench, cpu) in [&mut one, &mut two].into_iter().zip(&mut cpu) {
            let before = lab.processor_time("one")?;
            bench.run(SLICE)?;
            *cpu += lab.processor_time("one")?.saturating_sub(before);
        }
    }
    let (local, replicated) = (one.finish()?, two.finish()?);
    Ok(Row {
        pattern: pattern.title(),
        iops_ratio: replicated.iops / local.iops,
        p50_added_us: replicated.p50_us - local.p50_us,
        local: Figures::new(local, cpu[0]),
        replicated: Figures::new(replicated, cpu[1]),
    })
}

/// The median time from sending a write's bytes to another thread over TCP on loopback until its answer
/// is here.
fn round_trip_us() -> anyhow::Result<f64> {
    let (there, back) = ROUND_TRIP_BYTES;
    let total = ROUND_TRIPS + ROUND_TRIPS / 10;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        relevo_transport::net::tune(&stream)?;
        let mut received = vec![0; there];
        for _ in 0..total {
            stream.read_exact(&mut received)?;
            stream.write_all(&received[..back])?;
        }
        Ok(())
    });
    let mut stream = TcpStream::connect(address)?;
    relevo_transport::net::tune(&stream)?;
    stream.set_read_timeout(Some(REQUEST_BOUND))?;
    let (sent, mut answer) = (vec![7; there], vec![0; back]);
    let mut times = Vec::with_capacity(total);
    for _ in 0..total {
        let begun = now();
        stream.write_all(&sent)?;
        stream.read_exact(&mut answer)?;
        times.push(now().saturating_sub(begun));
    }
    if let Ok(ended) = echo.join() {
        ended?;
    }
    let times = &mut times[ROUND_TRIPS / 10..];
    times.sort_unstable();
    Ok(times[times.len() / 2].as_secs_f64() * 1e6)
}

fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

fn table(replicas: u8, rows: &[Row]) -> String {
    let replicated = format!("{replicas} (C)");
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "pattern",
        "replicas",
        "operations/s",
        "MiB/s",
        "median µs",
        "99 % µs",
        "primary's CPU µs",
        "of local",
    ]);
    for row in rows {
        for (name, figures, ratio) in [
            ("1", &row.local, None),
            (&replicated, &row.replicated, Some(row.iops_ratio)),
        ] {
            table.add_row([
                row.pattern.clone(),
                name.to_owned(),
                format!("{:.0}", figures.iops),
                format!("{:.0}", figures.mib_s),
                format!("{:.0}", figures.p50_us),
                format!("{:.0}", figures.p99_us),
                format!("{:.1}", figures.primary_cpu_us),
                ratio
                    .map(|ratio| format!("{:.0} %", ratio * 100.0))
                    .unwrap_or_default(),
            ]);
        }
    }
    for column in 2..=7 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}
