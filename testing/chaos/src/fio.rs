//! fio, writing and verifying again and again until it is told to stop.

use std::{
    path::Path,
    process::{Child, Command},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use relevo_host::command::NsCommand;

/// Writes each second: enough that every moment of a failure has some under way, few enough that
/// two cores have time for three daemons.
const WRITES_PER_SECOND: u32 = 600;

/// How often a running fio is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Runs of fio, one after the other, each with another seed.
#[derive(Debug)]
pub struct Fio {
    stop: Arc<AtomicBool>,
    child: Arc<Mutex<Option<Child>>>,
    runner: Option<JoinHandle<Result<u32, String>>>,
}

impl Fio {
    /// Whether fio with its NBD engine is installed; else why not.
    ///
    /// # Errors
    /// A sentence.
    pub fn is_installed() -> Result<(), String> {
        match Command::new("fio").arg("--enghelp=nbd").output() {
            Ok(output) if output.status.success() => Ok(()),
            _ => Err("fio with its nbd engine is not installed (Debian: fio)".to_owned()),
        }
    }

    /// Starts writing the first `size` bytes of an NBD export at random, and verifying them.
    /// fio keeps its files in `directory`.
    #[must_use]
    pub fn start(uri: &str, size: u64, directory: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let child = Arc::new(Mutex::new(None));
        let runner = Runner {
            uri: uri.to_owned(),
            size,
            directory: directory.to_owned(),
            stop: Arc::clone(&stop),
            child: Arc::clone(&child),
        };
        Self {
            stop,
            child,
            runner: Some(thread::spawn(move || runner.run())),
        }
    }

    /// Whether it is still at it: it ends by itself only when something was wrong.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.runner
            .as_ref()
            .is_some_and(|runner| !runner.is_finished())
    }

    /// Lets the run under way end, verification included. Returns how many runs there were.
    ///
    /// # Errors
    /// What fio said when it was not content.
    pub fn finish(mut self) -> Result<u32, String> {
        self.stop.store(true, Ordering::Relaxed);
        let runner = self.runner.take().ok_or("fio was never started")?;
        runner
            .join()
            .unwrap_or_else(|_| Err("the thread that runs fio panicked".to_owned()))
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let Some(runner) = self.runner.take() else {
            return;
        };
        // A test that fails leaves fio in the middle.
        while !runner.is_finished() {
            let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(child) = &mut *child {
                drop(child.kill());
            }
            drop(child);
            thread::sleep(POLL);
        }
        drop(runner.join());
    }
}

struct Runner {
    uri: String,
    size: u64,
    directory: std::path::PathBuf,
    stop: Arc<AtomicBool>,
    child: Arc<Mutex<Option<Child>>>,
}

impl Runner {
    fn run(&self) -> Result<u32, String> {
        let mut runs = 0;
        while !self.stop.load(Ordering::Relaxed) {
            runs += 1;
            self.once(runs)?;
        }
        Ok(runs)
    }

    fn once(&self, run: u32) -> Result<(), String> {
        let log = self.directory.join("fio.log");
        let output = std::fs::File::create(&log).map_err(|error| error.to_string())?;
        let errors = output.try_clone().map_err(|error| error.to_string())?;
        let child = NsCommand::new("fio")
            .current_dir(&self.directory)
            .args(["--name=chaos", "--ioengine=nbd", "--rw=randwrite"])
            // Mostly single blocks, some that cross several, and the regions of the log.
            .arg("--bssplit=4k/80:16k/15:64k/5")
            .args(["--iodepth=8", "--fsync=64", "--verify=crc32c"])
            // What was written is read back soon, in the middle of the failure, and at the end.
            .args(["--verify_backlog=128", "--verify_fatal=1"])
            .args(["--verify_state_save=0", "--do_verify=1"])
            .arg(format!("--rate_iops=,{WRITES_PER_SECOND}"))
            .arg(format!("--randseed={run}"))
            .arg(format!("--size={}", self.size))
            .arg(format!("--uri={}", self.uri))
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|error| error.to_string())?;
        *self.child.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        loop {
            thread::sleep(POLL);
            let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(running) = &mut *child else {
                return Err("fio is gone".to_owned());
            };
            match running.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) if status.success() => {
                    *child = None;
                    return Ok(());
                }
                Ok(Some(status)) => {
                    *child = None;
                    let words = std::fs::read_to_string(&log).unwrap_or_default();
                    return Err(format!("fio run {run}: {status}\n{words}"));
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}
