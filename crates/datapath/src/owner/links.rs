//! The owner's links to its peers.

use std::{mem, time::Duration};

use relevo_replication::Input;
use relevo_transport::EstablishedLink;
use relevo_types::{NodeId, Time};
use relevo_wire::Message;

use super::Owner;
use crate::{
    handle::DatapathEvent,
    link::{Link, OUTGOING_HIGH},
    poller::{Interest, Token},
};

/// A missing link is asked for this often. Both ends ask; a connection takes a few milliseconds.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a link that the engine closed may still send its last words.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

impl Owner {
    pub(super) fn add_link(&mut self, established: EstablishedLink) {
        if established.volume != self.config.volume {
            tracing::error!(link = ?established, volume = self.name, "a link of another volume");
            return;
        }
        let (peer, continues) = (established.peer, established.continues);
        let wanted = self.volume.as_ref().map(|it| it.options.encryption);
        if wanted.is_some_and(|wanted| wanted != established.encryption()) {
            // It is asked for again.
            tracing::info!(%peer, volume = self.name, "a link was made before its encryption changed");
            return;
        }
        let link = match Link::new(established) {
            Ok(link) => link,
            Err(error) => {
                tracing::warn!(%peer, %error, "a new link was gone at once");
                return;
            }
        };
        let number = self.number();
        let old = self.link_of.get(&peer).copied();
        if let Some(old) = old.filter(|_| continues)
            && self.move_out(old)
        {
            let follows = self.links.get(&old).is_some_and(|old| !old.moved_in);
            let mut link = link;
            link.follows = follows.then_some(old);
            self.links.insert(number, link);
            self.link_of.insert(peer, number);
            self.receive_link(number);
            return;
        }
        // The newest is the one that the peer uses; the engine treats it the same way.
        self.drop_links(peer);
        self.links.insert(number, link);
        self.link_of.insert(peer, number);
        self.tell(Input::LinkUp { peer });
        // What the peer sent early is in the TLS session, where epoll does not see it.
        self.receive_link(number);
    }

    /// The last message on a connection whose link moves to another one. False: it can't.
    fn move_out(&mut self, number: u32) -> bool {
        let Some(link) = self.links.get_mut(&number) else {
            return false;
        };
        let whole = link.closing().is_none() && link.follows.is_none() && !link.moved_out;
        link.moved_out = whole && link.send(&Message::Moved).is_ok();
        link.moved_out
    }

    /// The peer sends nothing more on a connection: what continues it is read from here on.
    fn moved_in(&mut self, number: u32) {
        if let Some(link) = self.links.get_mut(&number) {
            link.moved_in = true;
        }
        let mut links = self.links.iter_mut();
        let next = links.find(|(_, link)| link.follows == Some(number));
        if let Some((next, link)) = next {
            link.follows = None;
            let next = *next;
            self.receive_link(next);
        }
    }

    pub(super) fn receive_link(&mut self, number: u32) {
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        if link.closing().is_some() || link.follows.is_some() {
            return; // Written to at the end of the turn, or read later.
        }
        let peer = link.peer;
        let mut messages = mem::take(&mut self.messages);
        let ended = link.moved_in;
        let mut result = link.receive(&mut self.scratch, &mut messages);
        if ended && !messages.is_empty() {
            messages.clear();
            result = Err("the peer goes on where it said that it had ended".to_owned());
        }
        let moved = matches!(messages.last(), Some(Message::Moved));
        messages.truncate(messages.len() - usize::from(moved));
        for message in messages.drain(..) {
            self.tell(Input::Message { peer, message });
        }
        self.messages = messages;
        if moved {
            self.moved_in(number);
        }
        if let Err(reason) = result {
            self.lose_link(number, reason);
        }
    }

    pub(super) fn send(&mut self, peer: NodeId, message: &Message) {
        let Some(number) = self.link_of.get(&peer).copied() else {
            return;
        };
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        if let Err(reason) = link.send(message) {
            self.lose_link(number, reason);
        }
    }

    /// The engine is done with a link.
    pub(super) fn close_link(&mut self, peer: NodeId, reason: String) {
        let Some(number) = self.link_of.remove(&peer) else {
            return;
        };
        if let Some(link) = self.links.get_mut(&number) {
            link.close(relevo_disk::clock::now() + CLOSE_WAIT);
        }
        // What it continues is of no use any more.
        self.drop_links(peer);
        self.say(DatapathEvent::LinkLost { peer, reason });
    }

    /// Ends a link. Unwatched first: epoll watches the connection, not our descriptor, so a
    /// duplicate of it elsewhere would keep the events coming.
    fn drop_link(&mut self, number: u32) -> Option<NodeId> {
        let link = self.links.remove(&number)?;
        let token = Token::Link(number);
        let unwatched = self
            .poller
            .change(&link.stream, token, link.interest, Interest::default());
        if let Err(error) = unwatched {
            tracing::debug!(%error, "a link could not be unwatched");
        }
        Some(link.peer)
    }

    /// A connection is over. One that another one continues, or that continues another one, takes that with
    /// it, unless all of it was sent and read: what the link carried may be lost.
    fn lose_link(&mut self, number: u32, reason: String) {
        let Some(link) = self.links.get(&number) else {
            return;
        };
        let (peer, over) = (link.peer, link.closing().is_some() || link.has_moved());
        if over {
            self.drop_link(number);
            return;
        }
        self.drop_links(peer);
        self.tell(Input::LinkDown { peer });
        self.say(DatapathEvent::LinkLost { peer, reason });
    }

    /// Ends all connections to a peer but those that send their last words.
    fn drop_links(&mut self, peer: NodeId) {
        self.link_of.remove(&peer);
        let links = self.links.iter();
        let open: Vec<u32> = links
            .filter(|(_, link)| link.peer == peer && link.closing().is_none())
            .map(|(number, _)| *number)
            .collect();
        for number in open {
            self.drop_link(number);
        }
    }

    /// Ends links that are not what the configuration wants them to be now.
    pub(super) fn check_encryption(&mut self) {
        let Some(wanted) = self.volume.as_ref().map(|it| it.options.encryption) else {
            return;
        };
        let others = self.links.iter();
        let others = others.filter(|(_, link)| link.encryption() != wanted);
        for number in others.map(|(number, _)| *number).collect::<Vec<_>>() {
            let reason = format!("`encryption` is `{}` now: it is made anew", wanted.word());
            self.lose_link(number, reason);
        }
    }

    /// Sends what is queued on each link, and forgets those that are done.
    pub(super) fn send_links(&mut self, now: Time) {
        let mut lost = Vec::new();
        let mut backlog = 0;
        for (number, link) in &mut self.links {
            let over = match link.flush() {
                Ok(()) if link.is_done() => Some("closed".to_owned()),
                Ok(()) if link.has_moved() => Some("moved".to_owned()),
                Ok(()) if link.closing().is_some_and(|deadline| deadline <= now) => {
                    Some("closed; the peer did not take the last words".to_owned())
                }
                Ok(()) => {
                    let wanted = link.wanted();
                    let changed = self.poller.change(
                        &link.stream,
                        Token::Link(*number),
                        link.interest,
                        wanted,
                    );
                    link.interest = wanted;
                    changed.err().map(|error| error.to_string())
                }
                Err(reason) => Some(reason),
            };
            if let Some(reason) = over {
                lost.push((*number, reason));
            } else if link.closing().is_none() {
                backlog = backlog.max(link.outgoing_bytes());
            }
        }
        self.paused = backlog > OUTGOING_HIGH;
        for (number, reason) in lost {
            self.lose_link(number, reason);
        }
    }

    /// Asks for the links that are missing.
    pub(super) fn want_links(&mut self, now: Time) {
        let Some(volume) = &self.volume else {
            return;
        };
        let missing: Vec<NodeId> = volume
            .replicas
            .keys()
            .filter(|node| **node != self.config.node && !self.link_of.contains_key(node))
            .filter(|node| self.engine.wants_link(**node))
            .copied()
            .collect();
        for peer in missing {
            let at = self.ask_link_at.entry(peer).or_insert(now);
            if *at <= now {
                *at = now + ASK_INTERVAL;
                self.say(DatapathEvent::WantLink { peer });
            }
        }
    }

    /// When missing links are asked for next.
    pub(super) fn asks(&self) -> impl Iterator<Item = Time> {
        self.ask_link_at
            .iter()
            .filter(|(peer, _)| !self.link_of.contains_key(peer) && self.engine.wants_link(**peer))
            .map(|(_, at)| *at)
    }

    /// Peers whose replica was removed are not asked for any more.
    pub(super) fn forget_peers(&mut self) {
        if let Some(volume) = &self.volume {
            self.ask_link_at
                .retain(|peer, _| volume.replicas.contains_key(peer));
        }
    }
}
