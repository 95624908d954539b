//! fio writes at random, many requests at once over several connections, and verifies.

use crate::{
    subject::Subject,
    tools::{judge, run},
};

#[test]
fn fio_verifies_what_it_wrote() {
    const TEST: &str = "fio_verifies_what_it_wrote";
    let engine = run("fio", &["--enghelp=nbd"]);
    if !engine.status.success() {
        return said::skip(TEST, "fio with its nbd engine is not installed");
    }
    let subject = Subject::start(32 << 20);
    let uri = format!("--uri={}", subject.uri());
    for (name, mode, block, depth, jobs) in [
        ("small", "randwrite", "4k", "32", "1"),
        ("mixed", "randrw", "4k-64k", "16", "1"),
        ("large", "write", "1m", "4", "1"),
        ("trims", "randtrim", "64k", "8", "1"),
        ("many", "randwrite", "16k", "8", "4"),
    ] {
        let name = format!("--name={name}");
        let mode = format!("--rw={mode}");
        let block = if block.contains('-') {
            format!("--bsrange={block}")
        } else {
            format!("--bs={block}")
        };
        let depth = format!("--iodepth={depth}");
        let jobs = format!("--numjobs={jobs}");
        let mut arguments = vec![
            "--ioengine=nbd",
            "--size=8m",
            "--offset_increment=8m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=50",
            "--randseed=7",
            &uri,
            &name,
            &mode,
            &block,
            &depth,
            &jobs,
        ];
        if mode.ends_with("trim") {
            arguments.retain(|argument| !argument.starts_with("--verify"));
        }
        judge("fio", &arguments);
    }
}
