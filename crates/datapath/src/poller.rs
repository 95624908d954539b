//! epoll with typed tokens.

use std::{io, os::fd::OwnedFd, time::Duration};

use relevo_disk::clock;
use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    fd::AsFd,
    io::Errno,
};

use crate::patience::Patience;

/// Events taken at once.
const EVENTS_MAX: usize = 64;

/// What is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Token {
    /// Commands are queued.
    Command,
    /// The disk completed something.
    Disk,
    /// A link to a peer, by its number.
    Link(u32),
    /// An NBD listener, by its number.
    Listener(u32),
    /// An NBD session, by its number.
    Session(u32),
}

/// What is waited for on a descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Interest {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// An epoll instance.
pub(crate) struct Poller {
    epoll: OwnedFd,
    events: Vec<Event>,
    patience: Patience,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(EVENTS_MAX),
            patience: Patience::new(),
        })
    }

    /// Watches a descriptor; closing it ends that.
    pub(crate) fn add(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, token.data(), interest.flags())?)
    }

    /// Watches a counter that is never read: each time that it is counted up is reported once.
    pub(crate) fn add_edge(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd, token.data(), flags)?)
    }

    /// Changes what is waited for. With nothing to wait for the descriptor is not watched at all:
    /// epoll would go on reporting a hang-up.
    pub(crate) fn change(
        &self,
        fd: impl AsFd,
        token: Token,
        was: Interest,
        is: Interest,
    ) -> io::Result<()> {
        let nothing = Interest::default();
        if was == is {
            Ok(())
        } else if was == nothing {
            self.add(fd, token, is)
        } else if is == nothing {
            Ok(epoll::delete(&self.epoll, fd)?)
        } else {
            Ok(epoll::modify(&self.epoll, fd, token.data(), is.flags())?)
        }
    }

    /// Waits and appends what is ready.
    pub(crate) fn wait(&mut self, timeout: Duration, ready: &mut Vec<Token>) -> io::Result<()> {
        if timeout.is_zero() {
            return self.look(timeout, ready);
        }
        let mut wait = self.patience.begin(clock::now());
        while self.patience.looks(&mut wait, clock::now()) {
            self.look(Duration::ZERO, ready)?;
            if !ready.is_empty() {
                return Ok(());
            }
        }
        self.look(timeout, ready)?;
        self.patience.slept(&wait, clock::now());
        Ok(())
    }

    fn look(&mut self, timeout: Duration, ready: &mut Vec<Token>) -> io::Result<()> {
        self.events.clear();
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match epoll::wait(
            &self.epoll,
            spare_capacity(&mut self.events),
            Some(&timeout),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        ready.extend(self.events.iter().filter_map(|event| Token::of(event.data)));
        Ok(())
    }
}

impl Interest {
    fn flags(self) -> EventFlags {
        // Errors and hang-ups are always reported.
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.read);
        flags.set(EventFlags::OUT, self.write);
        flags
    }
}

impl Token {
    fn data(self) -> EventData {
        let (kind, number) = match self {
            Self::Command => (0, 0),
            Self::Disk => (1, 0),
            Self::Link(number) => (2, number),
            Self::Listener(number) => (3, number),
            Self::Session(number) => (4, number),
        };
        EventData::new_u64(kind << 32 | u64::from(number))
    }

    fn of(data: EventData) -> Option<Self> {
        let data = data.u64();
        let number = u32::try_from(data & u64::from(u32::MAX)).ok()?;
        Some(match data >> 32 {
            0 => Self::Command,
            1 => Self::Disk,
            2 => Self::Link(number),
            3 => Self::Listener(number),
            4 => Self::Session(number),
            _ => return None,
        })
    }
}
