//! A map whose keys grow: what is under way, in the order in which it began.
//!
//! Entries come at the end and go mostly near the front. A `BTreeMap` allocates and frees a node for
//! every few entries that pass; this is one ring of memory that is used again, so writes allocate
//! nothing once it is as long as the most that were ever under way.

use std::{collections::VecDeque, mem};

/// See the module. Keys may come in any order; one that is not the highest costs a move of those behind.
#[derive(Debug)]
pub(crate) struct Window<K, V> {
    /// By key.
    entries: VecDeque<(K, V)>,
}

impl<K, V> Default for Window<K, V> {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
        }
    }
}

impl<K: Ord, V> Window<K, V> {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn find(&self, key: &K) -> Result<usize, usize> {
        // The oldest is asked for most.
        match self.entries.front() {
            Some((first, _)) if first == key => Ok(0),
            _ => self.entries.binary_search_by(|(at, _)| at.cmp(key)),
        }
    }

    pub(crate) fn contains_key(&self, key: &K) -> bool {
        self.find(key).is_ok()
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        let at = self.find(key).ok()?;
        self.entries.get(at).map(|(_, value)| value)
    }

    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let at = self.find(key).ok()?;
        self.entries.get_mut(at).map(|(_, value)| value)
    }

    /// Adds an entry, in place of one with the same key.
    pub(crate) fn insert(&mut self, key: K, value: V) {
        if self.entries.back().is_none_or(|(last, _)| *last < key) {
            self.entries.push_back((key, value));
            return;
        }
        match self.find(&key) {
            Ok(at) => self.entries[at] = (key, value),
            Err(at) => self.entries.insert(at, (key, value)),
        }
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let at = self.find(key).ok()?;
        self.entries.remove(at).map(|(_, value)| value)
    }

    /// Drops all entries up to a key, that one included.
    pub(crate) fn remove_through(&mut self, key: &K) {
        while self.entries.front().is_some_and(|(first, _)| first <= key) {
            self.entries.pop_front();
        }
    }

    /// All entries; the window is empty then.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = (K, V)> + use<K, V> {
        mem::take(&mut self.entries).into_iter()
    }

    pub(crate) fn first(&self) -> Option<(&K, &V)> {
        self.entries.front().map(|(key, value)| (key, value))
    }

    pub(crate) fn last(&self) -> Option<(&K, &V)> {
        self.entries.back().map(|(key, value)| (key, value))
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, value)| (key, value))
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        self.entries.iter().map(|(key, _)| key)
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.iter().map(|(_, value)| value)
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.entries.iter_mut().map(|(_, value)| value)
    }

    /// Entries with higher keys.
    pub(crate) fn after_mut(&mut self, key: &K) -> impl Iterator<Item = (&K, &mut V)> {
        let from = self.entries.partition_point(|(at, _)| at <= key);
        let after = self.entries.range_mut(from..);
        after.map(|(key, value)| (&*key, value))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_window_is_a_map(steps in prop::collection::vec((0u8..5, 0u64..40), 1..200)) {
            let mut window = Window::default();
            let mut model = BTreeMap::new();
            for (number, (what, key)) in steps.into_iter().enumerate() {
                match what {
                    0 => {
                        window.remove_through(&key);
                        model = model.split_off(&(key + 1));
                    }
                    1 => prop_assert_eq!(window.remove(&key), model.remove(&key)),
                    2 => {
                        for (_, value) in window.after_mut(&key) {
                            *value += 1;
                        }
                        model.range_mut(key + 1..).for_each(|(_, value)| *value += 1);
                    }
                    _ => {
                        window.insert(key, number);
                        model.insert(key, number);
                    }
                }
                prop_assert_eq!(window.get(&key), model.get(&key));
                prop_assert_eq!(window.contains_key(&key), model.contains_key(&key));
                prop_assert_eq!(window.first(), model.first_key_value());
                prop_assert_eq!(window.last(), model.last_key_value());
                prop_assert!(window.iter().eq(&model));
            }
            prop_assert_eq!(window.len(), model.len());
            prop_assert_eq!(window.take().collect::<BTreeMap<_, _>>(), model);
            prop_assert!(window.is_empty());
        }
    }
}
