//! Where a replica's own blocks are kept before it takes another history (DESIGN, rule 9).
//!
//! Each saving has a thread that writes its file, so that the volume's thread never waits for that disk.
//! It gets a part at a time and answers each; the volume's thread, which owns [`Saver`], is woken then.
//! A file is called `.part` until all of it is on stable storage. One that nobody completes is removed: by
//! its thread when the saving is given up, by the next saving when the process died meanwhile.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender, sync_channel},
    },
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use relevo_format::saved::{Header, Writer};
use relevo_replication::{EngineConfig, SaveId, SavePart};
use relevo_types::{BLOCK_SIZE, LineageId, NodeId};

use crate::handle::ring;

/// Names of complete files end so.
const ENDING: &str = ".saved";

/// What follows while a file is not complete.
const PART: &str = ".part";

/// Written bytes that are not on stable storage yet: bounds how long the last sync takes, during which
/// the primary hears nothing.
const UNSYNCED_MAX: u64 = 16 << 20;

/// Other names that are tried when the one for this second is taken.
const NAMES_MAX: u32 = 100;

/// What became of a part.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) id: SaveId,
    /// The file, once it is complete.
    pub(crate) result: Result<Option<PathBuf>, String>,
}

/// The savings of a volume's replica, one at a time.
#[derive(Debug)]
pub(crate) struct Saver {
    dir: PathBuf,
    name: String,
    wake: Arc<OwnedFd>,
    to_me: Sender<Answer>,
    answers: Receiver<Answer>,
    /// The saving under way and its thread's next part.
    current: Option<(SaveId, SyncSender<Task>)>,
}

/// A part, and the size of the volume, which the first one needs.
type Task = (SavePart, u64);

impl Saver {
    /// `wake` is written to when there is an answer.
    pub(crate) fn new(dir: PathBuf, name: String, wake: OwnedFd) -> Self {
        let (to_me, answers) = mpsc::channel();
        Self {
            dir,
            name,
            wake: Arc::new(wake),
            to_me,
            answers,
            current: None,
        }
    }

    /// Takes a part; an [`Answer`] follows.
    pub(crate) fn save(&mut self, config: &EngineConfig, size: u64, id: SaveId, part: SavePart) {
        if matches!(part, SavePart::Begin { .. })
            && let Err(error) = self.begin(config, id)
        {
            let why = format!("no thread can be started for it: {error}");
            return self.answer(id, Err(why));
        }
        let current = self.current.as_ref().filter(|(current, _)| *current == id);
        let taken = current.is_some_and(|(_, parts)| parts.try_send((part, size)).is_ok());
        if !taken {
            let why = "its file was given up after an error".to_owned();
            self.answer(id, Err(why));
        }
    }

    /// The next answer, if there is one.
    pub(crate) fn next_answer(&mut self) -> Option<Answer> {
        let answer = self.answers.try_recv().ok()?;
        let over = !matches!(answer.result, Ok(None));
        if over
            && self
                .current
                .as_ref()
                .is_some_and(|(id, _)| *id == answer.id)
        {
            self.current = None;
        }
        Some(answer)
    }

    fn begin(&mut self, config: &EngineConfig, id: SaveId) -> io::Result<()> {
        // The thread of an earlier one ends, and removes what it has.
        self.current = None;
        // One part is under way: the engine waits for the answer before it has the next.
        let (parts, tasks) = sync_channel(1);
        let thread = SavingThread {
            config: config.clone(),
            dir: self.dir.clone(),
            name: self.name.clone(),
        };
        let (answers, wake) = (self.to_me.clone(), Arc::clone(&self.wake));
        thread::Builder::new()
            .name(format!("relevo-{}s", config.volume))
            .spawn(move || {
                thread.run(&tasks, |result| {
                    // Gone with the volume's thread: nobody waits.
                    if answers.send(Answer { id, result }).is_ok() {
                        ring(&wake);
                    }
                });
            })?;
        self.current = Some((id, parts));
        Ok(())
    }

    fn answer(&self, id: SaveId, result: Result<Option<PathBuf>, String>) {
        // Both ends are here.
        drop(self.to_me.send(Answer { id, result }));
        ring(&self.wake);
    }
}

struct SavingThread {
    config: EngineConfig,
    dir: PathBuf,
    name: String,
}

impl SavingThread {
    fn run(&self, tasks: &Receiver<Task>, answer: impl Fn(Result<Option<PathBuf>, String>)) {
        let mut file: Option<PartFile> = None;
        while let Ok((part, size)) = tasks.recv() {
            let result = match (part, file.take()) {
                (SavePart::Begin { from, to, blocks }, None) => {
                    self.begin(size, from, to, blocks).map(|begun| {
                        file = Some(begun);
                        None
                    })
                }
                (SavePart::Blocks { blocks, data }, Some(mut begun)) => {
                    match begun.writer.add(blocks, &data) {
                        Ok(()) => begun.written(data.len() as u64).map(|()| {
                            file = Some(begun);
                            None
                        }),
                        Err(error) => Err(begun.trouble(&error)),
                    }
                }
                (SavePart::End, Some(begun)) => begun.complete().map(Some),
                _ => Err("its parts came out of order; this is a defect of Relevo".to_owned()),
            };
            let over = !matches!(result, Ok(None));
            answer(result);
            if over {
                return;
            }
        }
    }

    fn begin(
        &self,
        size: u64,
        from: LineageId,
        to: NodeId,
        blocks: u64,
    ) -> Result<PartFile, String> {
        let dir = &self.dir;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| {
                format!(
                    "the directory {} can't be made: {error}; it must be a directory that the daemon may write to",
                    dir.display()
                )
            })?;
        remove_left_over(dir, &self.name);
        let unix_s = unix_s();
        let header = Header {
            cluster: self.config.cluster,
            volume: self.config.volume,
            name: self.name.clone(),
            size,
            node: self.config.node,
            lineage: from,
            to,
            blocks,
            unix_s,
        };
        let stem = format!("{}-{}-{:016x}", self.name, utc(unix_s), from.0);
        let (part, complete, file) = create(dir, &stem)?;
        // From here on it is removed when it is not completed.
        let mut unfinished = Unfinished(Some(part));
        let path = complete.display().to_string();
        match Writer::begin(file, &header) {
            Ok(writer) => Ok(PartFile {
                writer,
                unfinished,
                complete,
                bytes: blocks.saturating_mul(BLOCK_SIZE),
                unsynced: 0,
            }),
            Err(error) => {
                unfinished.remove();
                Err(trouble(&path, blocks.saturating_mul(BLOCK_SIZE), &error))
            }
        }
    }
}

/// A file that is being written.
struct PartFile {
    writer: Writer<File>,
    unfinished: Unfinished,
    complete: PathBuf,
    /// What it will hold.
    bytes: u64,
    unsynced: u64,
}

impl PartFile {
    fn written(&mut self, bytes: u64) -> Result<(), String> {
        self.unsynced += bytes;
        if self.unsynced < UNSYNCED_MAX {
            return Ok(());
        }
        self.unsynced = 0;
        let synced = self.writer.out().sync_data();
        synced.map_err(|error| self.trouble(&error))
    }

    fn complete(mut self) -> Result<PathBuf, String> {
        let path = self.complete.display().to_string();
        let told = |error: &io::Error| trouble(&path, self.bytes, error);
        let mut file = self.writer.end().map_err(|error| told(&error))?;
        file.flush()
            .and_then(|()| file.sync_all())
            .map_err(|error| told(&error))?;
        if let Some(part) = &self.unfinished.0 {
            fs::rename(part, &self.complete).map_err(|error| told(&error))?;
        }
        self.unfinished.0 = None;
        let dir = self.complete.parent().unwrap_or_else(|| Path::new("."));
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|error| told(&error))?;
        Ok(self.complete)
    }

    fn trouble(&self, error: &io::Error) -> String {
        trouble(&self.complete.display().to_string(), self.bytes, error)
    }
}

fn trouble(path: &str, bytes: u64, error: &io::Error) -> String {
    format!(
        "{path} can't be written: {error}; it needs {} MiB",
        bytes.div_ceil(1 << 20)
    )
}

/// Removes the file when it is dropped before it is complete.
struct Unfinished(Option<PathBuf>);

impl Unfinished {
    fn remove(&mut self) {
        if let Some(part) = self.0.take()
            && let Err(error) = fs::remove_file(&part)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %part.display(), %error, "an incomplete file could not be removed");
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Makes a file that is not there yet, under neither of its names.
fn create(dir: &Path, stem: &str) -> Result<(PathBuf, PathBuf, File), String> {
    let mut last = String::new();
    for number in 0..NAMES_MAX {
        let more = match number {
            0 => String::new(),
            number => format!("-{number}"),
        };
        let complete = dir.join(format!("{stem}{more}{ENDING}"));
        let part = dir.join(format!("{stem}{more}{ENDING}{PART}"));
        if complete.exists() {
            continue;
        }
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)
        {
            Ok(file) => return Ok((part, complete, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                last = format!(": {error}");
                break;
            }
        }
    }
    Err(format!(
        "no file can be made in {}{last}; it must be a directory that the daemon may write to",
        dir.display()
    ))
}

/// What a process that died left of this volume. Only one saving of a volume is under way at a time.
fn remove_left_over(dir: &Path, name: &str) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let file = entry.file_name();
        if file.to_str().is_some_and(|file| is_part_of(file, name)) {
            Unfinished(Some(entry.path())).remove();
        }
    }
}

/// Whether it is the name of an incomplete file of this volume, not of one whose name begins alike.
fn is_part_of(file: &str, name: &str) -> bool {
    let rest = file
        .strip_prefix(name)
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|rest| rest.strip_suffix(PART)?.strip_suffix(ENDING));
    let Some(rest) = rest else {
        return false;
    };
    let mut parts = rest.split('-');
    let time = parts.next().unwrap_or_default();
    let is_time = time.len() == "20260101T000000Z".len() && time.ends_with('Z');
    let lineage = parts.next().unwrap_or_default();
    let is_lineage = lineage.len() == 16 && lineage.bytes().all(|c| c.is_ascii_hexdigit());
    let counted = parts.next().is_none_or(|n| n.parse::<u32>().is_ok());
    is_time && is_lineage && counted && parts.next().is_none()
}

/// For people only.
fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs())
}

/// `20260131T235959Z`
fn utc(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86400, unix_s % 86400);
    // Days since 0000-03-01, so that a leap day is the last of its year: H. Hinnant's civil_from_days.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_dates() {
        for (unix_s, text) in [
            (0, "19700101T000000Z"),
            (951_782_400, "20000229T000000Z"),
            (1_700_000_000, "20231114T221320Z"),
            (4_107_542_399, "21000228T235959Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(utc(unix_s), text);
        }
    }

    #[test]
    fn incomplete_files_of_other_volumes_are_left_alone() {
        let ours = "mail-20231114T221320Z-00000000000000ff.saved.part";
        assert!(is_part_of(ours, "mail"));
        assert!(is_part_of(
            "mail-20231114T221320Z-00000000000000ff-2.saved.part",
            "mail"
        ));
        for other in [
            "mail-20231114T221320Z-00000000000000ff.saved",
            "mail-old-20231114T221320Z-00000000000000ff.saved.part",
            "mails-20231114T221320Z-00000000000000ff.saved.part",
            "mail-20231114T221320Z-00000000000000ff-x.saved.part",
            "mail.part",
        ] {
            assert!(!is_part_of(other, "mail"), "{other}");
        }
    }
}
