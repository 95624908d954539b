//! Lower epochs are refused (rule 1): a replica that has let a primary know that it is under its
//! epoch takes no write of a lower one that arrives after that. Watched on the wire, at each replica.
//!
//! A write that arrived before may still be acknowledged: whoever asked the replica for its tail
//! heard of it.

use std::collections::BTreeSet;

use relevo_types::{Epoch, NodeId, Seq};
use relevo_wire::Message;

use super::{Verdict, Violation};

const RULE: &str = "lower epochs are refused (rule 1)";

/// What one replica promised, since its process started.
#[derive(Debug, Default)]
pub struct LowerEpoch {
    /// The highest epoch that it told anybody to be under, or opened under.
    promised: Epoch,
    /// Writes of lower epochs that arrived after that.
    late: BTreeSet<(NodeId, Epoch, Seq)>,
}

impl LowerEpoch {
    /// The replica opened under an epoch.
    pub fn opened(&mut self, epoch: Epoch) {
        self.promised = self.promised.max(epoch);
    }

    /// A message reaches the replica.
    pub fn arrives(&mut self, from: NodeId, message: &Message) {
        if let Message::Write { epoch, seq, .. } = message
            && *epoch < self.promised
        {
            self.late.insert((from, *epoch, *seq));
        }
    }

    /// The replica sends a message.
    ///
    /// # Errors
    /// It acknowledges what it had to refuse.
    pub fn sends(&mut self, to: NodeId, message: &Message) -> Verdict {
        let epoch = match message {
            Message::Tail { epoch, .. }
            | Message::Uncertain { epoch, .. }
            | Message::FlushAck { epoch, .. }
            | Message::SyncAck { epoch, .. }
            | Message::Differ { epoch, .. }
            | Message::SyncDiffer { epoch, .. }
            | Message::BarrierAck { epoch, .. } => *epoch,
            Message::WriteAck { epoch, seq } => {
                if self.late.contains(&(to, *epoch, *seq)) {
                    return Err(Violation::new(
                        RULE,
                        format!(
                            "write {seq} of {epoch} from {to} was taken after {} was promised",
                            self.promised
                        ),
                    ));
                }
                *epoch
            }
            _ => return Ok(()),
        };
        self.promised = self.promised.max(epoch);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::ByteRange;
    use relevo_wire::Body;

    use super::*;

    #[test]
    fn only_what_arrives_after_the_promise_must_be_refused() {
        let write = |epoch, seq| Message::Write {
            epoch: Epoch(epoch),
            seq: Seq(seq),
            complete: Seq(0),
            range: ByteRange::new(0, 4096),
            body: Body::Zeroes,
            fua: false,
            dirty_for: 0,
        };
        let ack = |epoch, seq| Message::WriteAck {
            epoch: Epoch(epoch),
            seq: Seq(seq),
        };
        let tail = Message::Tail {
            epoch: Epoch(4),
            blocks: Vec::new(),
            certain: true,
        };
        let (old, new) = (NodeId(1), NodeId(2));
        let mut checker = LowerEpoch::default();
        checker.arrives(old, &write(2, 7));
        checker.sends(new, &tail).unwrap();
        assert!(checker.sends(old, &ack(2, 7)).is_ok());
        checker.arrives(old, &write(2, 8));
        checker.arrives(new, &write(4, 8));
        assert!(checker.sends(new, &ack(4, 8)).is_ok());
        assert!(checker.sends(old, &ack(2, 8)).is_err());
    }
}
