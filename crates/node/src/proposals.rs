//! What was proposed to the control log and not settled yet.

use std::time::Duration;

use relevo_types::{Time, cluster::Command};

use crate::{Effect, ProposalId, ProposalResult};

/// A proposal is repeated after this long when nothing came of it: some round trips of the control
/// log, and less than a person notices.
const REPEAT: Duration = Duration::from_millis(300);

/// Proposals remembered at most. A node has a few under way for each volume and service; what is
/// forgotten early is only proposed again early, and the control log refuses it.
const REMEMBERED_MAX: usize = 512;

#[derive(Debug)]
struct Proposal {
    id: ProposalId,
    command: Command,
    reason: String,
    at: Time,
    /// Revision of the state that it was made from.
    revision: u64,
    answered: bool,
}

/// All proposals of this node.
#[derive(Debug, Default)]
pub(crate) struct Proposals {
    last: u64,
    list: Vec<Proposal>,
    /// When the first of those asked for since [`Self::begin`] is due again.
    retry_at: Option<Time>,
}

impl Proposals {
    /// A new pass over all that is wanted begins.
    pub(crate) fn begin(&mut self) {
        self.retry_at = None;
    }

    /// When a pass is due because of proposals.
    pub(crate) fn deadline(&self) -> Time {
        self.retry_at.unwrap_or(Time::NEVER)
    }

    /// Proposes a command unless the same one is under way. Once answered it is not repeated
    /// before the state changed or the time passed.
    pub(crate) fn want(
        &mut self,
        now: Time,
        revision: u64,
        command: Command,
        reason: &str,
        out: &mut Vec<Effect>,
    ) {
        let known = self.list.iter().position(|known| known.command == command);
        if let Some(index) = known {
            let known = &self.list[index];
            let settled = known.answered && known.revision != revision;
            if now < known.at + REPEAT && !settled {
                self.retry(known.at + REPEAT);
                return;
            }
            self.list.remove(index);
        }
        if self.list.len() == REMEMBERED_MAX {
            self.list.remove(0);
        }
        self.last += 1;
        let id = ProposalId(self.last);
        self.list.push(Proposal {
            id,
            command: command.clone(),
            reason: reason.to_owned(),
            at: now,
            revision,
            answered: false,
        });
        self.retry(now + REPEAT);
        out.push(Effect::Propose {
            id,
            command,
            reason: reason.to_owned(),
        });
    }

    fn retry(&mut self, at: Time) {
        self.retry_at = Some(self.retry_at.map_or(at, |other| other.min(at)));
    }

    /// A proposal ended. Returns the command and its reason when it was applied.
    pub(crate) fn answered(
        &mut self,
        id: ProposalId,
        result: &ProposalResult,
    ) -> Option<(Command, String)> {
        let index = self.list.iter().position(|known| known.id == id)?;
        let known = &mut self.list[index];
        match result {
            ProposalResult::Applied(_) => {
                known.answered = true;
                Some((known.command.clone(), known.reason.clone()))
            }
            ProposalResult::Rejected(_) => {
                known.answered = true;
                None
            }
            // It may still come; it is repeated in its time.
            ProposalResult::Lost(_) => None,
        }
    }

    /// Forgets what is settled long since.
    pub(crate) fn forget_old(&mut self, now: Time) {
        self.list.retain(|known| now < known.at + REPEAT + REPEAT);
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::{
        NodeId, ServiceId,
        cluster::{Outcome, Rejection},
    };

    use super::*;

    fn acquire() -> Command {
        Command::Acquire {
            service: ServiceId(1),
            node: NodeId(1),
        }
    }

    fn ms(value: u64) -> Time {
        Time(value * 1_000_000)
    }

    #[test]
    fn a_proposal_under_way_is_not_repeated_before_its_time() {
        let mut proposals = Proposals::default();
        let mut out = Vec::new();
        proposals.want(ms(0), 1, acquire(), "why", &mut out);
        proposals.want(ms(299), 2, acquire(), "why", &mut out);
        assert_eq!(out.len(), 1);
        assert_eq!(proposals.deadline(), ms(300));
        proposals.want(ms(300), 2, acquire(), "why", &mut out);
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn an_answered_proposal_is_free_again_when_the_state_changed() {
        let mut proposals = Proposals::default();
        let mut out = Vec::new();
        proposals.want(ms(0), 1, acquire(), "why", &mut out);
        let rejected = ProposalResult::Rejected(Rejection::ServiceDisabled);
        assert_eq!(proposals.answered(ProposalId(1), &rejected), None);
        proposals.want(ms(1), 1, acquire(), "why", &mut out);
        assert_eq!(
            out.len(),
            1,
            "the state that it was refused for is not seen yet"
        );
        proposals.want(ms(2), 2, acquire(), "why", &mut out);
        assert_eq!(out.len(), 2);
        let applied = ProposalResult::Applied(Outcome::Done);
        let told = proposals.answered(ProposalId(2), &applied);
        assert_eq!(told, Some((acquire(), "why".to_owned())));
    }
}
