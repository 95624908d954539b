//! The owner of a volume: all its state, and the loop of its thread.
//!
//! One turn: take everything that is ready and tell the engine; carry out its effects in order;
//! hand the disk one batch; write each socket once; wait.

mod clients;
mod links;

use std::{
    collections::BTreeMap,
    io, mem,
    os::fd::OwnedFd,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    time::Duration,
};

use bytes::Bytes;
use relevo_disk::{Backing, DiskDriver, DriverChoice, IoMode, clock, open_driver};
use relevo_export::{
    Completion,
    nbd::{Export, NbdRequest, RequestTag},
};
use relevo_replication::{
    DiskError, DiskReply, Effect, Engine, EngineConfig, Input, OpId, OrderId, VolumeEvent,
};
use relevo_types::{NodeId, Time, cluster::Volume};
use relevo_wire::Message;

use crate::{
    handle::{
        Command, DatapathEvent, Listener, OrderDone, Shared, VolumeStatus, VolumeThreadConfig, lock,
    },
    link::{Link, READ_LEN},
    nbd::Client,
    poller::{Interest, Poller, Token},
    requests::Requests,
    saving::Saver,
};

/// The longest sleep: a bound on what a lost wake-up can cost.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// The shortest sleep when a deadline has passed and its handling left it there.
const SLEEP_MIN: Duration = Duration::from_millis(1);

/// The status that others see is this old at most.
const STATUS_AGE: Duration = Duration::from_millis(50);

/// Rounds of disk completions in one turn: a fast disk must not keep the sockets waiting.
const DISK_ROUNDS: usize = 8;

/// Where the answer to an application goes.
pub(crate) enum Origin {
    /// To an NBD session, by its number.
    Session(u32, RequestTag),
    /// To whoever called `VolumeHandle::request`.
    Caller(Completion),
}

type Events = Box<dyn Fn(DatapathEvent) + Send>;

/// See the module.
pub(crate) struct Owner {
    config: EngineConfig,
    name: String,
    engine: Engine,
    disk: Box<dyn DiskDriver>,
    driver: DriverChoice,
    io_mode: IoMode,
    poller: Poller,
    commands: Receiver<Command>,
    events: Option<Events>,
    effects: Vec<Effect>,
    /// Its room is used again for the next effects.
    carried_out: Vec<Effect>,
    completed: Vec<(OpId, Result<DiskReply, DiskError>)>,
    requests: Requests<Origin>,
    volume: Option<Arc<Volume>>,
    /// Why NBD clients can't have the volume now.
    unavailable: Option<String>,
    exports: Arc<[Export]>,
    links: BTreeMap<u32, Link>,
    /// The link in use, by peer; others are closing.
    link_of: BTreeMap<NodeId, u32>,
    /// When a peer's missing link is next asked for.
    ask_link_at: BTreeMap<NodeId, Time>,
    listeners: BTreeMap<u32, Listener>,
    clients: BTreeMap<u32, Client>,
    /// Clients that something happened to in this turn.
    touched: Vec<u32>,
    /// The peers can't keep up: requests are not read from clients.
    paused: bool,
    next_number: u32,
    last_order: u64,
    /// Whom to tell what came of an order.
    orders: BTreeMap<OrderId, OrderDone>,
    saver: Saver,
    scratch: Vec<u8>,
    messages: Vec<Message>,
    nbd_requests: Vec<NbdRequest>,
    status_at: Time,
    /// Something happened since the status was published.
    news: bool,
    stopping: bool,
}

impl Owner {
    pub(crate) fn open(
        config: VolumeThreadConfig,
        backing: Backing,
        commands: Receiver<Command>,
        bell: OwnedFd,
        events: Events,
    ) -> io::Result<Self> {
        let VolumeThreadConfig {
            mut engine,
            name,
            driver,
            saved_dir,
            ..
        } = config;
        engine.backing_size = backing.size();
        let io_mode = backing.mode().clone();
        let (disk, driver) = open_driver(Arc::new(backing), &driver)?;
        let mut owner = Self {
            engine: Engine::new(engine.clone()),
            config: engine,
            saver: Saver::new(saved_dir, name.clone(), bell),
            name,
            disk,
            driver,
            io_mode,
            poller: Poller::new()?,
            commands,
            events: Some(events),
            effects: Vec::new(),
            carried_out: Vec::new(),
            completed: Vec::new(),
            requests: Requests::default(),
            volume: None,
            unavailable: Some("it is not open on this node yet; try again".to_owned()),
            exports: Arc::new([]),
            links: BTreeMap::new(),
            link_of: BTreeMap::new(),
            ask_link_at: BTreeMap::new(),
            listeners: BTreeMap::new(),
            clients: BTreeMap::new(),
            touched: Vec::new(),
            paused: false,
            next_number: 0,
            last_order: 0,
            orders: BTreeMap::new(),
            scratch: vec![0; READ_LEN],
            messages: Vec::new(),
            nbd_requests: Vec::new(),
            status_at: Time::ZERO,
            news: true,
            stopping: false,
        };
        owner.offer();
        Ok(owner)
    }

    /// For the thread's last words.
    pub(crate) fn take_events(&mut self) -> Events {
        self.events.take().unwrap_or_else(|| Box::new(|_| ()))
    }

    pub(crate) fn status(&self) -> VolumeStatus {
        VolumeStatus {
            engine: self.engine.status(),
            driver: self.driver.clone(),
            io_mode: self.io_mode.clone(),
            nbd_sessions: self.clients.len(),
            as_of: clock::now(),
            alive: true,
        }
    }

    /// Ends everybody's connections; requests that wait are dropped, which answers them.
    pub(crate) fn disconnect(&mut self) {
        self.listeners.clear();
        self.clients.clear();
        self.links.clear();
        self.requests = Requests::default();
    }

    /// Runs until it is stopped.
    pub(crate) fn run(&mut self, shared: &Shared) -> io::Result<()> {
        let read = Interest {
            read: true,
            write: false,
        };
        self.poller.add(&shared.wake, Token::Command, read)?;
        self.poller.add_edge(self.disk.wake_fd(), Token::Disk)?;
        self.tell(Input::Attach);
        let mut ready = Vec::new();
        loop {
            self.news |= !ready.is_empty();
            for token in ready.drain(..) {
                self.take(token, shared);
            }
            self.take_commands();
            self.take_saved();
            if self.stopping {
                return Ok(());
            }
            let now = clock::now();
            if self.engine.deadline() <= now {
                self.tell(Input::Tick);
                self.news = true;
            }
            let mut more = self.carry_out();
            self.send_links(clock::now());
            self.serve_clients();
            self.want_links(clock::now());
            self.publish(shared);
            // A lost link or a client with room again may have left something to do.
            more |= !self.effects.is_empty() || !self.requests.to_engine.is_empty();
            let timeout = if more {
                Duration::ZERO
            } else {
                self.sleep(clock::now())
            };
            self.poller.wait(timeout, &mut ready)?;
        }
    }

    fn take(&mut self, token: Token, shared: &Shared) {
        match token {
            Token::Command => {
                let mut counter = [0; 8];
                // The queue is looked at after this: a later command wakes again.
                match rustix::io::read(&shared.wake, &mut counter) {
                    Ok(_) | Err(_) => {}
                }
            }
            Token::Disk => {} // Completions are taken each turn.
            Token::Link(number) => self.receive_link(number),
            Token::Listener(number) => self.accept(number),
            Token::Session(number) => self.receive_client(number),
        }
    }

    fn take_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return;
                }
            }
        }
    }

    /// What the thread answered that writes what gives way.
    fn take_saved(&mut self) {
        while let Some(answer) = self.saver.next_answer() {
            self.news = true;
            if let Ok(Some(path)) = &answer.result {
                self.say(DatapathEvent::Saved { path: path.clone() });
            }
            self.tell(Input::Saved {
                id: answer.id,
                result: answer.result.map(|_| ()),
            });
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Config(volume) => {
                let is_newer = self
                    .volume
                    .as_ref()
                    .is_none_or(|v| v.version <= volume.version);
                if is_newer {
                    self.volume = Some(Arc::clone(&volume));
                    self.forget_peers();
                    // First: not another byte the way that is not wanted any more.
                    self.check_encryption();
                }
                self.tell(Input::Config(volume));
                self.offer();
            }
            Command::LeaseUntil(until) => self.tell(Input::LeaseUntil(until)),
            Command::Link(link) => self.add_link(*link),
            Command::Demote => self.tell(Input::Demote),
            Command::Detach => self.tell(Input::Detach),
            Command::Order(order, done) => {
                self.last_order += 1;
                let id = OrderId(self.last_order);
                self.orders.insert(id, done);
                self.tell(Input::Order { id, order });
            }
            Command::Listen(listener) => self.listen(listener),
            Command::CloseNbd => {
                self.listeners.clear();
                self.close_clients("the export was closed on this node");
            }
            Command::Request(request, done) => {
                self.requests.submit(Origin::Caller(done), request);
            }
            Command::Stop => self.stopping = true,
            #[cfg(test)]
            Command::Panic => panic!("asked to panic"),
        }
    }

    /// Tells the engine; what it wants is carried out at the end of the turn.
    fn tell(&mut self, input: Input) {
        self.engine.handle(clock::now(), input, &mut self.effects);
    }

    /// Carries out effects until there are none. Returns whether the disk had more to say when
    /// its rounds were over.
    fn carry_out(&mut self) -> bool {
        for round in 0..DISK_ROUNDS {
            self.carry_out_effects();
            if round == 0 {
                // Before the disk gets its share: the peers' way is longer.
                self.send_links(clock::now());
            }
            self.disk.flush_submissions();
            let mut completed = mem::take(&mut self.completed);
            self.disk.poll_completions(&mut completed);
            if completed.is_empty() {
                self.completed = completed;
                return false;
            }
            for (op, result) in completed.drain(..) {
                self.tell(Input::Disk { op, result });
            }
            self.completed = completed;
        }
        self.carry_out_effects();
        self.disk.flush_submissions();
        true
    }

    fn carry_out_effects(&mut self) {
        loop {
            while let Some((id, request)) = self.requests.to_engine.pop_front() {
                self.tell(Input::Request { id, request });
            }
            if self.effects.is_empty() {
                break;
            }
            let room = mem::take(&mut self.carried_out);
            let mut effects = mem::replace(&mut self.effects, room);
            for effect in effects.drain(..) {
                self.carry_out_one(effect);
            }
            self.carried_out = effects;
        }
        while let Some((origin, result)) = self.requests.finished.pop_front() {
            self.answer(origin, result);
        }
    }

    fn carry_out_one(&mut self, effect: Effect) {
        match effect {
            Effect::Disk(op) => self.disk.submit(op),
            Effect::Send { peer, message } => self.send(peer, &message),
            Effect::CloseLink { peer, reason } => self.close_link(peer, reason),
            Effect::Reply { id, result } => self.requests.reply(id, result),
            Effect::Propose { expect, change } => {
                self.say(DatapathEvent::Propose { expect, change });
            }
            Effect::Save { id, part } => {
                let size = self.volume.as_ref().map_or(0, |volume| volume.size);
                self.saver.save(&self.config, size, id, part);
            }
            Effect::OrderDone { id, result } => {
                if let Some(done) = self.orders.remove(&id) {
                    done(result);
                }
            }
            Effect::Event(event) => self.heard(event),
        }
    }

    /// The engine reports: what it means for the clients, then on to the node.
    fn heard(&mut self, event: VolumeEvent) {
        match &event {
            VolumeEvent::Opened { .. } => {
                self.unavailable = None;
                self.offer();
            }
            VolumeEvent::Closed { .. } | VolumeEvent::DiskFailed { .. }
                if self.engine.holds_requests() => {}
            VolumeEvent::Closed { reason } | VolumeEvent::DiskFailed { reason } => {
                self.withdraw(reason);
            }
            VolumeEvent::Detached => self.withdraw("it is detached from this node"),
            VolumeEvent::Attached { .. }
            | VolumeEvent::Tends { .. }
            | VolumeEvent::Peer { .. }
            | VolumeEvent::Verified { .. }
            | VolumeEvent::SplitBrain { .. }
            | VolumeEvent::Healed { .. }
            | VolumeEvent::Unreadable { .. }
            | VolumeEvent::GaveWay { .. } => {}
        }
        self.status_at = Time::ZERO;
        self.say(DatapathEvent::Volume(event));
    }

    fn say(&self, event: DatapathEvent) {
        if let Some(events) = &self.events {
            events(event);
        }
    }

    fn answer(&mut self, origin: Origin, result: Result<Bytes, relevo_export::Errno>) {
        match origin {
            Origin::Caller(done) => done(result),
            Origin::Session(number, tag) => {
                if let Some(client) = self.clients.get_mut(&number) {
                    client.session.reply(tag, result);
                    self.touched.push(number);
                }
            }
        }
    }

    fn publish(&mut self, shared: &Shared) {
        let now = clock::now();
        if self.news && now >= self.status_at + STATUS_AGE {
            *lock(&shared.status) = self.status();
            self.status_at = now;
            self.news = false;
        }
    }

    /// How long nothing will happen by itself.
    fn sleep(&self, now: Time) -> Duration {
        let clients = self.clients.values().filter_map(|client| client.deadline);
        let links = self.links.values().filter_map(Link::closing);
        let asks = self.asks();
        let status = self.news.then(|| self.status_at + STATUS_AGE);
        clients
            .chain(links)
            .chain(asks)
            .chain(status)
            .chain([self.engine.deadline()])
            .min()
            .map_or(SLEEP_MAX, |next| next.since(now))
            .clamp(SLEEP_MIN, SLEEP_MAX)
    }

    fn number(&mut self) -> u32 {
        let number = self.next_number;
        self.next_number = self.next_number.wrapping_add(1);
        number
    }
}
