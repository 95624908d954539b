//! A rough measure, run by hand: `cargo test --release -p relevo-datapath -- --ignored --nocapture`.

use std::{
    thread,
    time::{Duration, Instant},
};

use relevo_export::nbd::{Op, Pipeline};
use relevo_types::NodeId;

use crate::cluster::{A, B, Cluster, SIZE};

const DEPTH: usize = 32;
const RUN: Duration = Duration::from_secs(3);

fn iops(nodes: &[NodeId], depth: usize) -> f64 {
    let mut cluster = Cluster::new(nodes);
    cluster.promote(A);
    let address = cluster.nodes[&A].nbd.clone();
    let worker = thread::spawn(move || {
        let mut pipeline = Pipeline::connect(&address, "mail", None).unwrap();
        let data = vec![5; 4096];
        let mut random = 1_u64;
        let mut submit = |pipeline: &mut Pipeline| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let offset = (random >> 33) % (SIZE / 4096) * 4096;
            let write = Op::Write {
                offset,
                data: &data,
                fua: false,
            };
            pipeline.submit(write).unwrap();
        };
        for _ in 0..depth {
            submit(&mut pipeline);
        }
        #[expect(clippy::disallowed_methods, reason = "measures wall time of a test")]
        let start = Instant::now();
        let mut done = 0;
        while start.elapsed() < RUN {
            pipeline.complete().unwrap().result.unwrap();
            submit(&mut pipeline);
            done += 1;
        }
        f64::from(done) / start.elapsed().as_secs_f64()
    });
    cluster.until("the measure is over", |_| worker.is_finished());
    worker.join().unwrap()
}

#[test]
#[ignore = "a measure, not a check"]
fn write_iops_local_and_replicated() {
    for depth in [1, DEPTH] {
        for round in 0..2 {
            let local = iops(&[A], depth);
            let replicated = iops(&[A, B], depth);
            println!(
                "4 KiB random writes, depth {depth}, round {round}: local {local:.0}/s, replicated {replicated:.0}/s, ratio {:.2}",
                replicated / local
            );
        }
    }
}
