//! The judges: found, run, and named when missing.

use std::process::{Command, Output, Stdio};

/// Whether a program can be started; says that the test is skipped when not.
pub(crate) fn missing(test: &str, program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .is_ok();
    if !found {
        said::skip(test, format_args!("{program} is not installed"));
    }
    !found
}

/// Runs a judge, with a limit on its time; its verdict must be good.
pub(crate) fn judge(program: &str, arguments: &[&str]) -> Output {
    let output = run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

/// Runs a judge that may fail.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout")
        .args(["--kill-after=5", "120", program])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// A Python that has libnbd's binding: Debian's own, which other installations may hide.
pub(crate) fn python_with_nbd() -> Option<&'static str> {
    ["/usr/bin/python3", "python3"].into_iter().find(|python| {
        Command::new(python)
            .args(["-c", "import nbd"])
            .output()
            .is_ok_and(|output| output.status.success())
    })
}
