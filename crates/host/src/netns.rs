//! Machines out of network namespaces: anonymous, so that nothing remains when the last process
//! that uses them is gone.
//!
//! Used by `demo` and by tests, as root or inside a user namespace ([`crate::userns`]). A
//! [`NetNs`] is held by a descriptor; interfaces in it vanish with it. The methods block for a
//! few milliseconds: each works on a thread of its own that enters the namespace, so the caller's
//! thread never changes place.

use std::{
    fmt, fs, io,
    net::IpAddr,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    panic,
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::{
    process::Pid,
    thread::{LinkNameSpaceType, UnshareFlags},
};

use crate::{HostError, Result, netlink::Netlink, procfs};

const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// How often [`NetNs::kill_all`] looks again for processes that were forked meanwhile, and for the
/// ends of those it killed.
const KILL_ROUNDS: u32 = 200;
const KILL_PAUSE: Duration = Duration::from_millis(10);

/// A network namespace. Clones are the same one.
#[derive(Clone)]
pub struct NetNs {
    label: String,
    fd: Arc<OwnedFd>,
    identity: (u64, u64),
}

impl fmt::Debug for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NetNs({})", self.label)
    }
}

impl NetNs {
    /// Makes an empty namespace; its loopback interface is up. `label` is for messages.
    ///
    /// # Errors
    /// The kernel refuses: no rights, or a limit.
    pub fn new(label: &str) -> Result<Self> {
        let made = on_a_thread(|| {
            // SAFETY: only the network namespace of this new thread changes; no descriptor table
            // or other resource that Rust code relies on is unshared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            fs::File::open(OWN_NAMESPACE)
        });
        let refused = |error: io::Error| {
            HostError::io(
                format!("cannot make the network namespace {label}"),
                error,
                "run as root, or where unprivileged user namespaces are allowed",
            )
        };
        let namespace = Self::of(label, made.and_then(|result| result).map_err(refused)?)?;
        namespace.set_up("lo", true)?;
        Ok(namespace)
    }

    /// The namespace that the calling thread is in.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn current() -> Result<Self> {
        let file = fs::File::open(OWN_NAMESPACE).map_err(|error| {
            HostError::io(
                "cannot open this thread's network namespace",
                error,
                "mount /proc",
            )
        })?;
        Self::of("here", file)
    }

    fn of(label: &str, file: fs::File) -> Result<Self> {
        let metadata = file.metadata().map_err(|error| {
            HostError::io("cannot identify a network namespace", error, "mount /proc")
        })?;
        Ok(Self {
            label: label.to_owned(),
            fd: Arc::new(file.into()),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// What it is called in messages.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The descriptor that holds it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Runs `work` on a thread inside the namespace and waits for it. Sockets that it opens stay
    /// there wherever they are used later. A panic of `work` goes on in the caller.
    ///
    /// # Errors
    /// The kernel does not let us in, or no thread is left.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_a_thread(|| {
            enter(self.fd())?;
            Ok(work())
        })
        .and_then(|result: io::Result<T>| result)
        .map_err(|error| {
            HostError::io(
                format!("cannot work in the network namespace {}", self.label),
                error,
                "run as the user that made it",
            )
        })
    }

    /// Runs `work` with a netlink conversation inside the namespace.
    ///
    /// # Errors
    /// As of [`Self::run`] and of `work`.
    pub fn with_netlink<T: Send>(
        &self,
        work: impl AsyncFnOnce(&Netlink) -> Result<T> + Send,
    ) -> Result<T> {
        self.run(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| {
                    HostError::io("cannot start a runtime", error, "raise the process limits")
                })?
                .block_on(async { work(&Netlink::open()?).await })
        })?
    }

    /// Sets an interface up or down. A bridge's port that is set down is a cut cable: the far end
    /// loses its carrier too.
    ///
    /// # Errors
    /// It does not exist, or the kernel refused.
    pub fn set_up(&self, interface: &str, up: bool) -> Result<()> {
        self.with_netlink(async |netlink| {
            let link = netlink.link(interface).await?;
            netlink.set_up(link.index, up).await
        })
    }

    /// Joins this namespace to `other` with a cable whose ends are called `name` here and `peer`
    /// there; both ends are up. `other` may be this one.
    ///
    /// # Errors
    /// A name is in use or longer than 15 bytes, or the kernel refused.
    pub fn add_cable(&self, name: &str, other: &Self, peer: &str) -> Result<()> {
        self.with_netlink(async |netlink| netlink.add_veth(name, peer, other.fd()).await)?;
        self.set_up(name, true)?;
        other.set_up(peer, true)
    }

    /// Makes a bridge, up.
    ///
    /// # Errors
    /// The name is in use, or the kernel refused.
    pub fn add_bridge(&self, bridge: &str) -> Result<()> {
        self.with_netlink(async |netlink| {
            netlink.add_bridge(bridge).await?;
            let index = netlink.link(bridge).await?.index;
            netlink.set_up(index, true).await
        })
    }

    /// Makes an interface a port of a bridge.
    ///
    /// # Errors
    /// One of them does not exist, or the kernel refused.
    pub fn add_port(&self, bridge: &str, port: &str) -> Result<()> {
        self.with_netlink(async |netlink| {
            let bridge = netlink.link(bridge).await?.index;
            let port = netlink.link(port).await?.index;
            netlink.set_bridge(port, bridge).await
        })
    }

    /// Isolated ports of a bridge do not reach each other, only the ports that are not isolated.
    ///
    /// # Errors
    /// The port does not exist, or the kernel refused.
    pub fn set_isolated(&self, port: &str, isolated: bool) -> Result<()> {
        self.with_netlink(async |netlink| {
            let port = netlink.link(port).await?.index;
            netlink.set_isolated(port, isolated).await
        })
    }

    /// Gives an interface a lasting address.
    ///
    /// # Errors
    /// The interface does not exist, or the kernel refused.
    pub fn add_address(&self, interface: &str, address: IpAddr, prefix: u8) -> Result<()> {
        self.with_netlink(async |netlink| {
            let index = netlink.link(interface).await?.index;
            netlink.put_address(index, address, prefix, None).await
        })
    }

    /// The processes whose main thread is in this namespace.
    #[must_use]
    pub fn processes(&self) -> Vec<Pid> {
        procfs::processes()
            .into_iter()
            .filter(|pid| self.holds(*pid))
            .collect()
    }

    /// The power cut: kills every process in the namespace with SIGKILL and waits until they are
    /// gone. Says how many were killed.
    ///
    /// # Errors
    /// The calling process is in the namespace itself, or a process does not die.
    pub fn kill_all(&self) -> Result<usize> {
        let what = || {
            format!(
                "cannot kill everything in the network namespace {}",
                self.label
            )
        };
        if self.holds(rustix::process::getpid()) {
            return Err(HostError::new(
                what(),
                "this process is in it",
                "call it from another namespace",
            ));
        }
        let mut killed = std::collections::BTreeSet::new();
        for _ in 0..KILL_ROUNDS {
            let living = self.processes();
            if living.is_empty() {
                return Ok(killed.len());
            }
            for pid in living {
                if procfs::kill_if(pid, |pid| self.holds(pid)) {
                    killed.insert(pid.as_raw_nonzero());
                }
            }
            thread::sleep(KILL_PAUSE);
        }
        let names: Vec<String> = self.processes().into_iter().map(procfs::name).collect();
        Err(HostError::new(
            what(),
            format!("still there after SIGKILL: {}", names.join(", ")),
            "they wait for a device in the kernel; free that device",
        ))
    }

    /// A zombie has no namespace any more and is not held.
    fn holds(&self, pid: Pid) -> bool {
        fs::metadata(format!("/proc/{}/ns/net", pid.as_raw_nonzero()))
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity)
    }
}

/// Moves the calling thread into a network namespace.
pub(crate) fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
    Ok(())
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("relevo-netns".to_owned())
            .spawn_scoped(scope, work)?;
        Ok(worker
            .join()
            .unwrap_or_else(|panic| panic::resume_unwind(panic)))
    })
}
