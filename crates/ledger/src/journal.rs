//! The client's journal: what was acknowledged, and when. It is the witness that is kept off the
//! cluster.
//!
//! One line for each acknowledged entry, `<number> <sent> <acknowledged>`, times in nanoseconds
//! of `CLOCK_BOOTTIME`, so that other processes of the machine can compare them with theirs; lines
//! with `#` tell of trouble. A killed client leaves at most its last line unfinished.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    time::Duration,
};

use relevo_types::Time;

/// An entry that the ledger acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Acknowledged {
    /// Its number.
    pub number: u64,
    /// When it was first sent.
    pub sent: Time,
    /// When the acknowledgement came.
    pub acknowledged: Time,
}

/// A time without an acknowledgement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// The last acknowledgement before it, or the start of the window.
    pub from: Time,
    /// The first acknowledgement after it, or the end of the window.
    pub to: Time,
}

impl Gap {
    /// How long it was.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.to.since(self.from)
    }
}

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal {
    file: File,
    last: Option<u64>,
}

impl Journal {
    /// Opens or makes a journal for more lines; an unfinished last line is cut off.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let content = fs::read(path)?;
        let whole = content.iter().rposition(|byte| *byte == b'\n');
        file.set_len(whole.map_or(0, |end| end as u64 + 1))?;
        let last = Self::read(path)?.iter().map(|entry| entry.number).max();
        Ok(Self { file, last })
    }

    /// The highest number in it so far.
    #[must_use]
    pub const fn last(&self) -> Option<u64> {
        self.last
    }

    /// Adds an acknowledged entry.
    ///
    /// # Errors
    /// The system's.
    pub fn add(&mut self, entry: &Acknowledged) -> io::Result<()> {
        let Acknowledged {
            number,
            sent,
            acknowledged,
        } = entry;
        self.last = self.last.max(Some(*number));
        // One write for one line: a reader never sees half of one, but at the end.
        self.file
            .write_all(format!("{number} {} {}\n", sent.0, acknowledged.0).as_bytes())
    }

    /// Adds a line for people.
    ///
    /// # Errors
    /// The system's.
    pub fn note(&mut self, at: Time, text: &str) -> io::Result<()> {
        let text = text.replace(['\n', '\r'], " ");
        self.file
            .write_all(format!("# {} {text}\n", at.0).as_bytes())
    }

    /// Reads what a journal holds, in the order of acknowledgement. Can be done while it is written.
    ///
    /// # Errors
    /// The system's, or a line that is none of a journal.
    pub fn read(path: &Path) -> io::Result<Vec<Acknowledged>> {
        Self::read_from(path, 0).map(|(entries, _)| entries)
    }

    /// Reads what was added from byte `offset` on, and says where to go on the next time.
    ///
    /// # Errors
    /// As of [`Self::read`].
    pub fn read_from(path: &Path, offset: u64) -> io::Result<(Vec<Acknowledged>, u64)> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut content = String::new();
        file.read_to_string(&mut content)?;
        let whole = content.rfind('\n').map_or("", |end| &content[..=end]);
        let entries = whole
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .map(|line| {
                parse(line).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("`{line}` is not a line of a journal"),
                    )
                })
            })
            .collect::<io::Result<_>>()?;
        Ok((entries, offset + whole.len() as u64))
    }
}

fn parse(line: &str) -> Option<Acknowledged> {
    let mut fields = line.split(' ').map(|field| field.parse::<u64>().ok());
    let entry = Acknowledged {
        number: fields.next()??,
        sent: Time(fields.next()??),
        acknowledged: Time(fields.next()??),
    };
    fields.next().is_none().then_some(entry)
}

/// The longest time without an acknowledgement that touches the window: a gap that began before
/// it or ends after it counts in full. When no acknowledgement came after the window's last one, the gap
/// lasts to the end of the window. `entries` in the order of acknowledgement.
#[must_use]
pub fn longest_gap(entries: &[Acknowledged], from: Time, to: Time) -> Gap {
    let mut longest = Gap { from, to: from };
    let mut before: Option<Time> = None;
    for moment in entries.iter().map(|entry| entry.acknowledged) {
        let gap = Gap {
            from: before.unwrap_or(from),
            to: moment,
        };
        if gap.to >= from && gap.from <= to && gap.length() > longest.length() {
            longest = gap;
        }
        before = Some(moment);
    }
    let open = Gap {
        from: before.unwrap_or(from),
        to,
    };
    if open.length() > longest.length() {
        longest = open;
    }
    longest
}

/// The acknowledged numbers that the ledger does not have: must be none.
#[must_use]
pub fn missing(entries: &[Acknowledged], present: &BTreeSet<u64>) -> Vec<u64> {
    entries
        .iter()
        .map(|entry| entry.number)
        .filter(|number| !present.contains(number))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(number: u64, ms: u64) -> Acknowledged {
        Acknowledged {
            number,
            sent: Time((ms - 1) * 1_000_000),
            acknowledged: Time(ms * 1_000_000),
        }
    }

    #[test]
    fn a_journal_is_read_back_and_continued_after_a_torn_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.last(), None);
        journal.add(&at(1, 10)).unwrap();
        journal.note(Time(5), "no answer\nat all").unwrap();
        journal.add(&at(2, 20)).unwrap();
        journal.file.write_all(b"3 12").unwrap();
        assert_eq!(Journal::read(&path).unwrap(), [at(1, 10), at(2, 20)]);
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.last(), Some(2));
        journal.add(&at(3, 30)).unwrap();
        assert_eq!(Journal::read(&path).unwrap().len(), 3);
        fs::write(&path, "what is this\n").unwrap();
        assert!(Journal::read(&path).is_err());
    }

    #[test]
    fn gaps_are_found_at_the_edges_too() {
        let ms = |ms: u64| Time(ms * 1_000_000);
        let entries = [at(1, 10), at(2, 20), at(3, 500), at(4, 510), at(5, 2000)];
        let gap = longest_gap(&entries, ms(0), ms(600));
        assert_eq!((gap.from, gap.to), (ms(510), ms(2000)), "it began inside");
        assert_eq!(
            longest_gap(&entries, ms(0), ms(505)).length(),
            Duration::from_millis(480)
        );
        assert_eq!(
            longest_gap(&entries, ms(300), ms(400)).length(),
            Duration::from_millis(480)
        );
        let open = longest_gap(&entries, ms(1990), ms(9000));
        assert_eq!((open.from, open.to), (ms(2000), ms(9000)));
        assert_eq!(
            longest_gap(&[], ms(1), ms(3)).length(),
            Duration::from_millis(2)
        );
    }

    #[test]
    fn missing_numbers_are_named() {
        let present = BTreeSet::from([1, 3]);
        assert_eq!(missing(&[at(1, 1), at(2, 2), at(3, 3)], &present), [2]);
    }
}
