//! Every state of a model, breadth first: the first violation found is one with the fewest steps.

use std::{
    collections::VecDeque,
    fmt::{self, Debug, Display},
    hash::Hasher as _,
};

/// What can be explored.
pub trait Model {
    /// A state, all of it.
    type State: Clone;
    /// What may happen, in words by `Debug`.
    type Step: Clone + Debug;

    /// Where everything begins.
    fn initial(&self) -> Self::State;
    /// Calls `visit` with all that may happen next, in a fixed order: the step, what it leads to,
    /// whether it is a fault, and what is violated in it.
    fn next(&self, state: &Self::State, visit: &mut dyn FnMut(Next<Self>));
    /// What is wrong with a state.
    ///
    /// # Errors
    /// The property that is violated.
    fn check(&self, state: &Self::State) -> Result<(), String>;
    /// Whether a state is what the model shall come to when faults stop.
    fn is_whole(&self, state: &Self::State) -> bool;
    /// The state as bytes: equal for equal states.
    fn encode<'a>(&self, state: &Self::State, into: &'a mut crate::pack::Writer) -> &'a [u8];
    /// The state of such bytes.
    fn decode(&self, bytes: &[u8]) -> Self::State;
}

/// One thing that may happen next.
#[derive(Debug)]
pub struct Next<M: Model + ?Sized> {
    /// What happens.
    pub step: M::Step,
    /// Where it leads.
    pub state: M::State,
    /// Whether it is a fault: the model must come to a whole state without more of them.
    pub fault: bool,
}

/// What an exploration found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// Different states.
    pub states: usize,
    /// Steps between states.
    pub steps: u64,
    /// Steps to the state that is farthest away.
    pub depth: u32,
    /// States in which everything is well.
    pub whole: usize,
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            states,
            steps,
            depth,
            whole,
        } = self;
        write!(
            f,
            "{states} states, {steps} steps, depth {depth}, {whole} whole"
        )
    }
}

/// A way to a state that violates a property.
#[derive(Clone, Debug)]
pub struct Violation {
    /// What is violated.
    pub what: String,
    /// The steps to it, in words.
    pub steps: Vec<String>,
    /// States seen before it was found.
    pub states: usize,
}

impl Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (after {} states)", self.what, self.states)?;
        for (number, step) in (1..).zip(&self.steps) {
            writeln!(f, "{number:4}. {step}")?;
        }
        Ok(())
    }
}

/// States that were seen, as bytes one after the other, and a table to find them.
#[derive(Debug)]
struct Seen {
    bytes: Vec<u8>,
    /// Where each begins, and the end of the last.
    starts: Vec<usize>,
    /// Open addressing; a number is one more than that of a state, 0 is free.
    table: Vec<u32>,
}

impl Seen {
    fn new() -> Self {
        Self {
            bytes: Vec::new(),
            starts: vec![0],
            table: vec![0; 1 << 16],
        }
    }

    fn len(&self) -> usize {
        self.starts.len() - 1
    }

    fn get(&self, number: u32) -> &[u8] {
        let number = number as usize;
        &self.bytes[self.starts[number]..self.starts[number + 1]]
    }

    /// The number of a state, and whether it is new.
    fn insert(&mut self, state: &[u8]) -> (u32, bool) {
        if self.len() * 2 > self.table.len() {
            self.grow();
        }
        let mut at = self.home(state);
        while self.table[at] != 0 {
            let number = self.table[at] - 1;
            if self.get(number) == state {
                return (number, false);
            }
            at = (at + 1) % self.table.len();
        }
        let number = u32::try_from(self.len()).expect("fewer than four thousand million states");
        self.table[at] = number + 1;
        self.bytes.extend_from_slice(state);
        self.starts.push(self.bytes.len());
        (number, true)
    }

    fn home(&self, state: &[u8]) -> usize {
        let mut hash = Fast(0);
        hash.write(state);
        usize::try_from(hash.finish()).unwrap_or(0) % self.table.len()
    }

    fn grow(&mut self) {
        self.table = vec![0; self.table.len() * 4];
        for number in 0..u32::try_from(self.len()).unwrap_or(u32::MAX) {
            let mut at = self.home(self.get(number));
            while self.table[at] != 0 {
                at = (at + 1) % self.table.len();
            }
            self.table[at] = number + 1;
        }
    }
}

/// A hash that is quick and the same everywhere.
struct Fast(u64);

impl std::hash::Hasher for Fast {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0.rotate_left(5) ^ u64::from_le_bytes(word))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.0 ^= self.0 >> 32;
        }
    }
}

/// Visits every state; at most `states_max`, beyond which it says so as a violation.
///
/// # Errors
/// The first violation: of a property, or a state from which no whole one can be reached.
pub fn explore<M: Model>(model: &M, states_max: usize) -> Result<Report, Violation> {
    let mut seen = Seen::new();
    let mut writer = crate::pack::Writer::default();
    let mut parents: Vec<u32> = vec![0];
    // Steps that are no faults, as (from, to).
    let mut heals: Vec<(u32, u32)> = Vec::new();
    let mut whole: Vec<u32> = Vec::new();
    let initial = model.initial();
    seen.insert(model.encode(&initial, &mut writer));
    let mut queue = VecDeque::from([0_u32]);
    let (mut steps, mut depth, mut level_end) = (0, 0, 1);
    while let Some(number) = queue.pop_front() {
        if number as usize == level_end {
            level_end = seen.len();
            depth += 1;
        }
        let state = model.decode(seen.get(number));
        if let Err(what) = model.check(&state) {
            return Err(violation(model, &seen, &parents, number, what));
        }
        if model.is_whole(&state) {
            whole.push(number);
        }
        if seen.len() > states_max {
            let what = format!("not explored: more than {states_max} states at depth {depth}");
            return Err(violation(model, &seen, &parents, number, what));
        }
        model.next(&state, &mut |next| {
            steps += 1;
            let (to, new) = seen.insert(model.encode(&next.state, &mut writer));
            if new {
                parents.push(number);
                queue.push_back(to);
            }
            if !next.fault && to != number {
                heals.push((number, to));
            }
        });
    }
    let report = Report {
        states: seen.len(),
        steps,
        depth,
        whole: whole.len(),
    };
    match first_stuck(seen.len(), heals, whole) {
        None => Ok(report),
        Some(number) => {
            let what = "no more faults, and it never gets whole".to_owned();
            Err(violation(model, &seen, &parents, number, what))
        }
    }
}

/// The first state from which no whole one is reached by steps that are no faults.
fn first_stuck(states: usize, mut heals: Vec<(u32, u32)>, whole: Vec<u32>) -> Option<u32> {
    heals.sort_unstable_by_key(|(_, to)| *to);
    let mut heals_to = vec![false; states];
    let mut open = whole;
    for number in &open {
        heals_to[*number as usize] = true;
    }
    while let Some(number) = open.pop() {
        let first = heals.partition_point(|(_, to)| *to < number);
        for (from, _) in heals[first..].iter().take_while(|(_, to)| *to == number) {
            if !std::mem::replace(&mut heals_to[*from as usize], true) {
                open.push(*from);
            }
        }
    }
    let stuck = heals_to.iter().position(|heals| !heals)?;
    u32::try_from(stuck).ok()
}

fn violation<M: Model>(
    model: &M,
    seen: &Seen,
    parents: &[u32],
    mut number: u32,
    what: String,
) -> Violation {
    let mut steps = Vec::new();
    let mut writer = crate::pack::Writer::default();
    while number != 0 {
        let parent = parents[number as usize];
        let mut words = None;
        model.next(&model.decode(seen.get(parent)), &mut |next| {
            if words.is_none() && model.encode(&next.state, &mut writer) == seen.get(number) {
                words = Some(format!("{:?}", next.step));
            }
        });
        steps.push(words.unwrap_or_else(|| "?".to_owned()));
        number = parent;
    }
    steps.reverse();
    Violation {
        what,
        steps,
        states: seen.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{Bits as _, Reader, Writer};

    /// Counts to `stop` by ones and twos.
    struct Counter {
        stop: u8,
        forbidden: u8,
        whole: u8,
    }

    impl Model for Counter {
        type State = u8;
        type Step = u8;

        fn initial(&self) -> u8 {
            0
        }

        fn next(&self, state: &u8, visit: &mut dyn FnMut(Next<Self>)) {
            for step in [1, 2] {
                if state + step <= self.stop {
                    visit(Next {
                        step,
                        state: state + step,
                        fault: step == 2,
                    });
                }
            }
        }

        fn check(&self, state: &u8) -> Result<(), String> {
            (*state != self.forbidden)
                .then_some(())
                .ok_or_else(|| "forbidden".to_owned())
        }

        fn is_whole(&self, state: &u8) -> bool {
            *state == self.whole
        }

        fn encode<'a>(&self, state: &u8, into: &'a mut Writer) -> &'a [u8] {
            into.clear();
            into.bits(&mut state.clone(), 8);
            into.finish()
        }

        fn decode(&self, bytes: &[u8]) -> u8 {
            let mut state = 0;
            Reader::new(bytes).bits(&mut state, 8);
            state
        }
    }

    #[test]
    fn every_state_is_visited_once() {
        let model = Counter {
            stop: 9,
            forbidden: 99,
            whole: 9,
        };
        let report = explore(&model, 100).expect("nothing is forbidden");
        assert_eq!((report.states, report.steps, report.depth), (10, 17, 5));
    }

    #[test]
    fn the_way_to_a_violation_is_the_shortest() {
        let model = Counter {
            stop: 9,
            forbidden: 5,
            whole: 9,
        };
        let found = explore(&model, 100).expect_err("5 is forbidden");
        assert_eq!(found.steps.len(), 3);
    }

    #[test]
    fn a_state_that_heals_by_nothing_is_found() {
        // From 9 one does not come back to 8.
        let model = Counter {
            stop: 9,
            forbidden: 99,
            whole: 8,
        };
        let found = explore(&model, 100).expect_err("9 is stuck");
        assert_eq!(found.steps, ["1", "2", "2", "2", "2"]);
    }

    #[test]
    fn too_many_states_are_said() {
        let model = Counter {
            stop: 200,
            forbidden: 255,
            whole: 200,
        };
        let found = explore(&model, 100).expect_err("too many");
        assert!(found.what.starts_with("not explored"), "{}", found.what);
    }
}
