//! libnbd with its own checks switched off sends what no client should.

use crate::{
    subject::Subject,
    tools::{judge, python_with_nbd},
};

const SCRIPT: &str = r#"
import errno, nbd, sys

uri = sys.argv[1]
frozen = sys.argv[2]

def connect(uri, structured=True):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    return h

def expect(what, number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, (what, error.errnum, error.string)
    else:
        assert number == 0, (what, "no error")

for structured in (True, False):
    h = connect(uri, structured)
    size = h.get_size()
    assert h.get_structured_replies_negotiated() == structured
    block = bytes(4096)
    cases = [
        ("read past the end", errno.EINVAL, lambda: h.pread(4096, size)),
        ("read across the end", errno.EINVAL, lambda: h.pread(8192, size - 4096)),
        ("read at the far end", errno.EINVAL, lambda: h.pread(1, 2**63 - 1)),
        ("read nothing", errno.EINVAL, lambda: h.pread(0, 0)),
        ("read unaligned", 0, lambda: h.pread(3, 5)),
        ("write past the end", errno.ENOSPC, lambda: h.pwrite(block, size)),
        ("write across the end", errno.ENOSPC, lambda: h.pwrite(bytes(8192), size - 4096)),
        ("write unaligned", errno.EINVAL, lambda: h.pwrite(block, 1)),
        ("write a part of a block", errno.EINVAL, lambda: h.pwrite(bytes(100), 0)),
        ("write, unknown flag", errno.EINVAL, lambda: h.pwrite(block, 0, 1 << 10)),
        ("write with df", errno.EINVAL, lambda: h.pwrite(block, 0, nbd.CMD_FLAG_DF)),
        ("write with fua", 0, lambda: h.pwrite(block, 0, nbd.CMD_FLAG_FUA)),
        ("read, unknown flag", errno.EINVAL, lambda: h.pread(4096, 0, 1 << 10)),
        ("zero past the end", errno.ENOSPC, lambda: h.zero(4096, size)),
        ("zero fast", errno.EINVAL, lambda: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)),
        ("zero without a hole", 0, lambda: h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)),
        ("trim past the end", errno.EINVAL, lambda: h.trim(4096, size)),
        ("trim nothing", errno.EINVAL, lambda: h.trim(0, 0)),
        ("trim with fua", 0, lambda: h.trim(4096, 0, nbd.CMD_FLAG_FUA)),
        ("cache", errno.EINVAL, lambda: h.cache(4096, 0)),
        ("flush", 0, lambda: h.flush()),
        ("flush, unknown flag", errno.EINVAL, lambda: h.flush(1 << 10)),
    ]
    if structured:
        extents = lambda *unused: 0
        cases += [
            ("status", 0, lambda: h.block_status(8192, 0, extents)),
            ("status past the end", errno.EINVAL, lambda: h.block_status(4096, size, extents)),
            ("status of nothing", errno.EINVAL, lambda: h.block_status(0, 0, extents)),
            ("read with df", 0, lambda: h.pread(4096, 0, nbd.CMD_FLAG_DF)),
        ]
    else:
        cases += [
            ("read with df", errno.EINVAL, lambda: h.pread(4096, 0, nbd.CMD_FLAG_DF)),
        ]
    for what, number, call in cases:
        expect(what, number, call)
        # The connection is as good as before.
        assert h.pread(4096, 0) == bytes(4096), what
    h.shutdown()

h = connect(frozen)
assert h.is_read_only()
expect("write, read-only", errno.EPERM, lambda: h.pwrite(bytes(4096), 0))
expect("zero, read-only", errno.EPERM, lambda: h.zero(4096, 0))
expect("trim, read-only", errno.EPERM, lambda: h.trim(4096, 0))
h.shutdown()

# Options one by one.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name) and 0)
assert names == ["mail", "frozen"], names
contexts = []
h.add_meta_context("base:")
h.opt_list_meta_context(lambda name: contexts.append(name) and 0)
assert contexts == ["base:allocation"], contexts
h.set_export_name("none")
expect("info of none", errno.ENOENT, lambda: h.opt_info())
h.set_export_name("wiki")
# libnbd's number for "refused by policy".
expect("info of wiki", errno.ENOTSUP, lambda: h.opt_info())
h.set_export_name("mail")
h.opt_info()
assert h.get_size() > 0
h.opt_abort()

# TLS is wished for and not had: the client goes on without.
if nbd.NBD().supports_tls():
    h = nbd.NBD()
    h.set_tls(nbd.TLS_ALLOW)
    h.connect_uri(uri)
    assert not h.get_tls_negotiated()
    h.shutdown()
print("done")
"#;

#[test]
fn libnbd_illegal_requests() {
    let Some(python) = python_with_nbd() else {
        return said::skip("libnbd_illegal_requests", "no Python has libnbd's binding");
    };
    let subject = Subject::start(4 << 20);
    let script = subject.file("illegal.py");
    std::fs::write(&script, SCRIPT).unwrap();
    let output = judge(
        python,
        &[&script, &subject.uri(), &subject.uri_of("frozen")],
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout), "done\n");
}
