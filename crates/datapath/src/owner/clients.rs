//! The owner's NBD listeners and clients.

use std::{mem, sync::Arc, time::Duration};

use relevo_disk::clock;
use relevo_export::nbd::{Export, Phase};
use relevo_types::size::format_size;

use super::{Origin, Owner};
use crate::{
    handle::Listener,
    nbd::{Client, SESSIONS_MAX},
    poller::{Interest, Token},
};

/// How long a client whose session is ended may take to read its last answers.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

/// Connections accepted in one turn.
const ACCEPTS_PER_TURN: usize = 16;

impl Owner {
    /// Brings what NBD clients are offered up to date.
    pub(super) fn offer(&mut self) {
        let size = self.volume.as_ref().map_or(0, |volume| volume.size);
        let export = Export {
            name: self.name.clone(),
            description: format!("replicated volume of {}", format_size(size)),
            size,
            read_only: false,
            // Whole blocks are faster, any alignment works.
            min_block: 1,
            unavailable: self.unavailable.clone(),
        };
        if *self.exports == [export.clone()] {
            return;
        }
        self.exports = Arc::new([export]);
        for client in self.clients.values_mut() {
            if client.is_negotiating() {
                client.session.set_exports(Arc::clone(&self.exports));
            }
        }
    }

    /// The volume is not to be had here any more.
    pub(super) fn withdraw(&mut self, reason: &str) {
        self.unavailable = Some(reason.to_owned());
        self.offer();
        let deadline = clock::now() + CLOSE_WAIT;
        for (number, client) in &mut self.clients {
            if matches!(client.session.phase(), Phase::Serving(_)) {
                client.close(reason, deadline);
                self.touched.push(*number);
            }
        }
    }

    pub(super) fn close_clients(&mut self, reason: &str) {
        let deadline = clock::now() + CLOSE_WAIT;
        for (number, client) in &mut self.clients {
            client.close(reason, deadline);
            self.touched.push(*number);
        }
    }

    pub(super) fn listen(&mut self, listener: Listener) {
        let number = self.number();
        let read = Interest {
            read: true,
            write: false,
        };
        match self.poller.add(&listener, Token::Listener(number), read) {
            Ok(()) => {
                self.listeners.insert(number, listener);
            }
            Err(error) => {
                tracing::error!(volume = self.name, %error, "can't listen for NBD clients");
            }
        }
    }

    pub(super) fn accept(&mut self, number: u32) {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(listener) = self.listeners.get(&number) else {
                return;
            };
            let stream = match listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(volume = self.name, %error, "an NBD client was not accepted");
                    return;
                }
            };
            if self.clients.len() >= SESSIONS_MAX {
                tracing::warn!(
                    volume = self.name,
                    "{SESSIONS_MAX} NBD clients are connected, one more was turned away"
                );
                continue;
            }
            let client = Client::new(stream, Arc::clone(&self.exports));
            let number = self.number();
            self.clients.insert(number, client);
            self.touched.push(number);
        }
    }

    pub(super) fn receive_client(&mut self, number: u32) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        self.touched.push(number);
        let mut requests = mem::take(&mut self.nbd_requests);
        if !self.paused {
            client.receive(&mut requests);
        }
        self.submit(number, requests);
    }

    /// Writes answers, takes requests that there is room for again, and forgets who is gone.
    pub(super) fn serve_clients(&mut self) {
        let mut touched = mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        for number in &touched {
            self.serve(*number);
        }
        touched.clear();
        touched.append(&mut self.touched);
        self.touched = touched;
        let now = clock::now();
        let paused = self.paused;
        for (number, client) in &mut self.clients {
            let wanted = client.wanted(paused);
            let token = Token::Session(*number);
            let changed = self
                .poller
                .change(&client.stream, token, client.interest, wanted);
            client.interest = wanted;
            if let Err(error) = changed {
                tracing::error!(%error, "can't watch an NBD connection");
                client.deadline = Some(now);
            }
        }
        self.clients.retain(|_, client| !client.is_over(now));
    }

    fn serve(&mut self, number: u32) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        let mut requests = mem::take(&mut self.nbd_requests);
        client.understood(&mut requests);
        client.send();
        // Also with requests under way: while the engine is suspended they may take for ever, and
        // whoever disconnected does not wait for them.
        if client.is_closing() && client.deadline.is_none() {
            client.deadline = Some(clock::now() + CLOSE_WAIT);
        }
        self.submit(number, requests);
    }

    fn submit(&mut self, number: u32, mut requests: Vec<relevo_export::nbd::NbdRequest>) {
        for taken in requests.drain(..) {
            let origin = Origin::Session(number, taken.tag);
            self.requests.submit(origin, taken.request);
        }
        self.nbd_requests = requests;
    }
}
