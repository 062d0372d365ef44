//! `LookupDrafter`: what followed the same tokens earlier in the text (prompt lookup, n-grams).
//!
//! Each text has a suffix automaton (Blumer et al. 1985), which grows by a token in constant time
//! on average and knows the longest end of the text that occurred before. What followed it there,
//! the last time, is the draft.

use std::collections::BTreeMap;

use lathe_program::BackendError;

use super::{DraftText, DraftTree, Drafter};
use crate::request::RequestId;

/// Tokens that an end of the text must share with an earlier place.
const MATCH_MIN: usize = 2;
/// Tokens of a draft of a request that has had none yet.
const FIRST_TOKENS: usize = 4;
/// Shorter ends of the text whose latest place is kept up to date.
const UPDATED_MAX: usize = 32;

/// Drafts from the request's own prompt and answer.
#[derive(Debug, Default)]
pub struct LookupDrafter {
    texts: BTreeMap<RequestId, Text>,
}

#[derive(Debug)]
struct Text {
    automaton: Automaton,
    /// Tokens of the next draft at most. It grows while whole drafts are accepted.
    tokens_max: usize,
}

impl LookupDrafter {
    /// Knows no text yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Drafter for LookupDrafter {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        for (text, tree) in texts.iter().zip(trees) {
            let known = self
                .texts
                .entry(text.request)
                .or_insert_with(|| Text { automaton: Automaton::new(), tokens_max: FIRST_TOKENS });
            let automaton = &mut known.automaton;
            text.tokens[automaton.length..].iter().for_each(|token| automaton.push(*token));
            let Some(next) = automaton.earlier(MATCH_MIN) else { continue };
            let count = text.nodes_max.min(text.depth_max).min(known.tokens_max);
            let mut parent = None;
            for token in text.tokens[next..].iter().take(count) {
                parent = Some(tree.push(parent, *token));
            }
        }
        Ok(())
    }

    fn observe(&mut self, request: RequestId, nodes: usize, accepted: usize) {
        let Some(text) = self.texts.get_mut(&request).filter(|_| nodes > 0) else { return };
        text.tokens_max = match accepted {
            all if all == nodes => (2 * text.tokens_max).min(DraftTree::NODES_MAX),
            some => (some + 1).max(2),
        };
    }

    fn forget(&mut self, request: RequestId) {
        self.texts.remove(&request);
    }
}

/// A set of ends that occur at the same places.
#[derive(Debug, Clone, Default)]
struct State {
    /// Tokens of the longest of them.
    length: usize,
    /// The state of the longest shorter end that occurs at more places; `None` at the start.
    link: Option<u32>,
    /// One past the place where they ended last, before the text's own end.
    latest: usize,
    next: BTreeMap<u32, u32>,
}

/// The suffix automaton of a text.
#[derive(Debug)]
struct Automaton {
    states: Vec<State>,
    /// The state of the whole text.
    last: u32,
    length: usize,
}

impl Automaton {
    fn new() -> Self {
        Self { states: vec![State::default()], last: 0, length: 0 }
    }

    /// Appends a token.
    fn push(&mut self, token: u32) {
        self.update_latest();
        self.length += 1;
        let new = self.states.len() as u32;
        let state = State { length: self.length, latest: self.length, ..State::default() };
        self.states.push(state);
        let mut at = Some(self.last);
        let mut found = None;
        while let Some(state) = at {
            found = self.states[state as usize].next.get(&token).copied();
            if found.is_some() {
                break;
            }
            self.states[state as usize].next.insert(token, new);
            at = self.states[state as usize].link;
        }
        let link = match (at, found) {
            (Some(from), Some(to)) => self.split(from, to, token),
            _ => 0,
        };
        self.states[new as usize].link = Some(link);
        self.last = new;
    }

    /// The state of the ends that `from` has, with `token` behind them: `to`, or a copy of it where
    /// `to` has longer ones too.
    fn split(&mut self, from: u32, to: u32, token: u32) -> u32 {
        let length = self.states[from as usize].length + 1;
        if self.states[to as usize].length == length {
            return to;
        }
        let copy = self.states.len() as u32;
        self.states.push(State { length, ..self.states[to as usize].clone() });
        self.states[to as usize].link = Some(copy);
        let mut at = Some(from);
        while let Some(state) = at.filter(|at| self.states[*at as usize].next[&token] == to) {
            self.states[state as usize].next.insert(token, copy);
            at = self.states[state as usize].link;
        }
        copy
    }

    /// The text's end is a place of all its ends, once another token follows it.
    fn update_latest(&mut self) {
        let mut at = Some(self.last);
        for _ in 0..UPDATED_MAX {
            let Some(state) = at else { return };
            self.states[state as usize].latest = self.length;
            at = self.states[state as usize].link;
        }
    }

    /// One past the latest place, before the text's end, of the longest end of the text that
    /// occurs there, if it has `least` tokens.
    fn earlier(&self, least: usize) -> Option<usize> {
        let state = self.states[self.last as usize].link?;
        let state = &self.states[state as usize];
        (state.length >= least).then_some(state.latest)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// The longest end of `text` that also ends earlier, by trying each.
    fn longest(text: &[u32]) -> usize {
        let occurs = |length: usize| {
            let end = &text[text.len() - length..];
            text[..text.len() - 1].windows(length).any(|earlier| earlier == end)
        };
        (1..text.len()).rev().find(|length| occurs(*length)).unwrap_or(0)
    }

    #[test]
    fn the_longest_end_is_found() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for alphabet in [1, 2, 3, 10] {
            let (mut automaton, mut text) = (Automaton::new(), Vec::new());
            for _ in 0..300 {
                let token = random.random_range(0..alphabet);
                automaton.push(token);
                text.push(token);
                let expected = longest(&text);
                assert_eq!(automaton.earlier(expected + 1), None, "{text:?}");
                if expected == 0 {
                    continue;
                }
                let next = automaton.earlier(expected).expect("it occurs");
                assert!(next < text.len());
                let (end, place) = (&text[text.len() - expected..], next - expected..next);
                assert_eq!(end, &text[place], "{text:?}");
            }
        }
    }

    #[test]
    fn drafts_grow_while_they_are_accepted() {
        let mut drafter = LookupDrafter::new();
        let tokens: Vec<u32> = (0..40).chain(0..3).collect();
        let request = RequestId(1);
        let text = DraftText {
            request,
            tokens: &tokens,
            sampling: Default::default(),
            nodes_max: 30,
            depth_max: 20,
        };
        let draft = |drafter: &mut LookupDrafter| {
            let mut trees = [DraftTree::default()];
            drafter.propose(&[text], &mut trees).unwrap();
            let [tree] = trees;
            assert!(tree.is_chain());
            (0..tree.len()).map(|node| tree.token(node)).collect::<Vec<_>>()
        };
        assert_eq!(draft(&mut drafter), [3, 4, 5, 6]);
        drafter.observe(request, 4, 4);
        assert_eq!(draft(&mut drafter).len(), 8);
        drafter.observe(request, 8, 0);
        assert_eq!(draft(&mut drafter), [3, 4]);
        for _ in 0..9 {
            drafter.observe(request, 2, 2);
        }
        assert_eq!(draft(&mut drafter).len(), 20, "as deep as is asked for");
    }
}
