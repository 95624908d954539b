//! Whole volumes copied by others, in and out.

use std::fs;

use crate::{
    subject::{Subject, noise},
    tools::{judge, missing, run},
};

const SIZE: usize = 24 << 20;

#[test]
fn nbdcopy_both_ways() {
    if missing("nbdcopy_both_ways", "nbdcopy") {
        return;
    }
    let subject = Subject::start(SIZE);
    let (from, to) = (subject.file("from"), subject.file("to"));
    for (seed, arguments) in [
        (1, &[][..]),
        (2, &["--connections=4", "--requests=32", "--flush"]),
        (3, &["--synchronous", "--request-size=32768"]),
    ] {
        let content = noise(SIZE, seed);
        fs::write(&from, &content).unwrap();
        judge("nbdcopy", &[arguments, &[&from, &subject.uri()]].concat());
        assert!(subject.content() == content, "{arguments:?}: in");
        judge("nbdcopy", &[arguments, &[&subject.uri(), &to]].concat());
        assert!(fs::read(&to).unwrap() == content, "{arguments:?}: out");
        fs::remove_file(&to).unwrap();
    }
}

#[test]
fn qemu_img_converts_and_compares() {
    if missing("qemu_img_converts_and_compares", "qemu-img") {
        return;
    }
    let subject = Subject::start(SIZE);
    let from = subject.file("from");
    let content = noise(SIZE, 4);
    fs::write(&from, &content).unwrap();
    let uri = subject.uri();
    judge(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", &from, &uri],
    );
    assert!(subject.content() == content);
    judge(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &from, &uri],
    );
    let to = subject.file("to.qcow2");
    judge(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &uri, &to],
    );
    judge(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", &uri, &to],
    );

    // The comparison has teeth.
    let mut other = content;
    other[SIZE / 2] ^= 1;
    fs::write(&from, &other).unwrap();
    let different = run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &from, &uri],
    );
    assert_eq!(different.status.code(), Some(1));
}

#[test]
fn qemu_io_patterns() {
    if missing("qemu_io_patterns", "qemu-io") {
        return;
    }
    let subject = Subject::start(SIZE);
    let uri = subject.uri();
    let commands = [
        "write -P 0xaa 0 1M",
        "write -f -P 0xbb 1M 64k",
        "write -z -u 64k 128k",
        "discard 256k 64k",
        "aio_write -P 0xcc 4M 2M",
        "aio_write -P 0xdd 8M 4M",
        "aio_flush",
        "flush",
        "read -P 0xaa 0 64k",
        "read -P 0 64k 128k",
        "read -P 0xbb 1M 64k",
        "read -P 0xcc 4M 2M",
        "read -P 0xdd 8M 4M",
        // Not aligned: QEMU widens it to our block size.
        "write -P 0xee 10000 777",
        "read -P 0xee 10000 777",
        "read -P 0xaa 9000 1000",
    ];
    let mut arguments = vec!["-f", "raw"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let output = judge("qemu-io", &arguments);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        !text.contains("failed") && !text.contains("error"),
        "{text}"
    );
}
