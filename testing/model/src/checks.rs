//! What must be true in every state, and when all is well.

use crate::{
    state::{Role, Stage, State, WRITES, Wrong, block_of},
    steps::Protocol,
};

const fn bit(number: usize) -> u8 {
    1 << number
}

impl Protocol {
    /// The properties that a state has.
    pub(crate) fn check_state(&self, s: &State) -> Result<(), String> {
        match s.wrong {
            Wrong::Nothing => {}
            Wrong::StaleRead => return Err("rule 8: a stale read under a valid lease".to_owned()),
            Wrong::Lost => {
                return Err(
                    "rule 3: an acknowledged write is lost: the primary lacks it".to_owned(),
                );
            }
            Wrong::Merged => {
                return Err("rule 9: divergent data was given up in silence".to_owned());
            }
        }
        self.members_have_what_is_promised(s)?;
        self.one_writer_an_epoch(s)?;
        self.sent_or_marked(s)
    }

    /// Rules 1, 2 and 4: what was acknowledged is on every member of the committed set that knows what it has.
    fn members_have_what_is_promised(&self, s: &State) -> Result<(), String> {
        for node in 0..self.nodes {
            let n = &s.nodes[node];
            if !(n.up && n.certain) || s.newest(node).in_sync & bit(node) == 0 {
                continue;
            }
            for block in 0..self.blocks {
                let promised = s.promised[usize::from(n.lineage)][block];
                if s.position(n.content[block]) < s.position(promised) {
                    return Err(format!(
                        "rules 1, 2, 4: node {node} is in the committed set and lacks the acknowledged write {promised}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Rule 1: who acknowledged under an epoch was the only one.
    fn one_writer_an_epoch(&self, s: &State) -> Result<(), String> {
        if self.budget.forced > 0 {
            // Two logs count their own epochs.
            return Ok(());
        }
        for a in 0..WRITES {
            for b in 0..a {
                let both = bit(a) | bit(b);
                if s.acknowledged & both == both
                    && s.epoch_of[a] == s.epoch_of[b]
                    && s.writer_of[a] != s.writer_of[b]
                {
                    return Err(format!(
                        "rule 1: two nodes acknowledged under epoch {}",
                        s.epoch_of[a]
                    ));
                }
            }
        }
        Ok(())
    }

    /// Rules 5 and 6: where a replica differs from the primary in force, one of both knows why.
    fn sent_or_marked(&self, s: &State) -> Result<(), String> {
        for node in 0..self.nodes {
            let n = &s.nodes[node];
            if n.role != Role::Primary || usize::from(s.newest(node).primary) != node {
                continue;
            }
            for peer in self.others(node) {
                let p = &s.nodes[peer];
                if p.lineage != n.lineage {
                    continue;
                }
                for block in 0..self.blocks {
                    let known = n.dirty[peer] | p.dirty[peer] | if p.up { 0 } else { p.hot };
                    if p.content[block] == n.content[block] || known & bit(block) != 0 {
                        continue;
                    }
                    let awaited = (0_u8..3).any(|at| {
                        let here = block_of(at + 1, self.blocks) == block;
                        let at = usize::from(at);
                        let sent = n.unacked[at] & bit(peer) != 0;
                        let doubted = (p.tail | p.open) & bit(at) != 0;
                        here && (sent || doubted)
                    });
                    if !awaited {
                        return Err(format!(
                            "rule 5: node {peer} lacks block {block} of primary {node}, neither sent nor marked"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// A primary serves, and all are in sync; or a person was told that histories diverged.
    pub(crate) fn all_is_well(&self, s: &State) -> bool {
        if s.alarm {
            return true;
        }
        let config = s.newest(0);
        let node = usize::from(config.primary);
        let there = |node: &usize| !self.is_lost(s, *node);
        let everyone = (0..self.nodes)
            .filter(there)
            .fold(0, |all, node| all | bit(node))
            & self.may_be_members();
        if node >= self.nodes || config.tends || self.is_lost(s, node) || config.in_sync != everyone
        {
            return false;
        }
        let n = &s.nodes[node];
        let known = |peer: &crate::state::Node| {
            let log = &s.logs[usize::from(peer.lineage)];
            peer.up && peer.known == log.epoch && peer.lineage == n.lineage
        };
        n.role == Role::Primary
            && n.lease
            && n.open == 0
            && (0..self.nodes)
                .filter(there)
                .all(|node| known(&s.nodes[node]))
            && self.others(node).filter(there).all(|peer| {
                let p = &s.nodes[peer];
                let follows = self.follower == Some(peer);
                let stage = if follows {
                    Stage::Following
                } else {
                    Stage::InSync
                };
                // Members have forgotten what they marked for the follower.
                let drained = follows || self.follower.is_none_or(|slot| p.dirty[slot] == 0);
                n.peers[peer].stage == stage && p.certain && p.content == n.content && drained
            })
    }
}
