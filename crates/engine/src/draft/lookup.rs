//! `LookupDrafter`: what followed the same tokens earlier in the text (prompt lookup, n-grams).
//!
//! Each text has a suffix automaton (Blumer et al. 1985), which grows by a token in constant time
//! on average and knows the longest end of the text that occurred before. What followed it there,
//! the last time, is the draft.

use std::collections::BTreeMap;

use lathe_program::BackendError;

use super::acceptance::Acceptance;
use super::{DraftText, DraftTree, Drafter};
use crate::request::RequestId;

/// Tokens that an end of the text must share with an earlier place.
const MATCH_MIN: usize = 2;
/// Shorter ends of the text whose latest place is kept up to date.
const UPDATED_MAX: usize = 32;
/// A draft that does not pay is tried all the same once in so many times, so that it is known when
/// it pays again.
const TRIED_ONE_IN: u32 = 64;

/// Drafts from the request's own prompt and answer.
#[derive(Debug, Default)]
pub struct LookupDrafter {
    texts: BTreeMap<RequestId, Text>,
    /// Of all texts, by the class of the match's length.
    acceptance: [Acceptance; CLASSES],
}

#[derive(Debug)]
struct Text {
    automaton: Automaton,
    acceptance: Acceptance,
    /// The class of the match that the last draft is from.
    class: usize,
    /// Drafts that were not made since one was tried.
    left_out: u32,
}

/// Classes of matches: of 2, 3, up to 7, up to 15, and more tokens.
const CLASSES: usize = 5;

fn class_of(length: usize) -> usize {
    match length {
        ..=2 => 0,
        3 => 1,
        4..=7 => 2,
        8..=15 => 3,
        _ => 4,
    }
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
            let known = self.texts.entry(text.request).or_insert_with(|| Text {
                automaton: Automaton::new(),
                acceptance: Acceptance::default(),
                class: 0,
                left_out: 0,
            });
            let automaton = &mut known.automaton;
            text.tokens[automaton.length..].iter().for_each(|token| automaton.push(*token));
            let Some((length, next)) = automaton.earlier(MATCH_MIN) else { continue };
            known.class = class_of(length);
            let rate = (self.acceptance[known.class].rate() * known.acceptance.rate()).sqrt();
            // A token is accepted after all before it.
            let pays = |depth: usize| rate.powi(depth as i32) >= text.probability_min;
            let most = text.nodes_max.min(text.depth_max).min(text.tokens.len() - next);
            let mut count = (1..=most).take_while(|depth| pays(*depth)).count();
            if count == 0 {
                known.left_out += 1;
                // A busy engine tries nothing.
                if known.left_out < TRIED_ONE_IN || text.probability_min > 0.9 {
                    continue;
                }
                count = 1.min(most);
            }
            known.left_out = 0;
            let mut parent = None;
            for token in text.tokens[next..].iter().take(count) {
                parent = Some(tree.push(parent, *token));
            }
        }
        Ok(())
    }

    fn observe(&mut self, request: RequestId, tree: &DraftTree, accepted: usize) {
        let Some(text) = self.texts.get_mut(&request) else { return };
        // What follows the first refused token was not tried.
        let tried = tree.len().min(accepted + 1);
        text.acceptance.observe(accepted, tried);
        self.acceptance[text.class].observe(accepted, tried);
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

    /// The length of the longest end of the text that occurs before the text's end, and one past
    /// the latest place where it does, if it has `least` tokens.
    fn earlier(&self, least: usize) -> Option<(usize, usize)> {
        let state = self.states[self.last as usize].link?;
        let state = &self.states[state as usize];
        (state.length >= least).then_some((state.length, state.latest))
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
                let (length, next) = automaton.earlier(expected).expect("it occurs");
                assert!(length == expected && next < text.len());
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
        let mut draft = |probability_min: f64, answer: Option<usize>| {
            let (sampling, nodes_max, depth_max) = (Default::default(), 30, 20);
            let (tokens, step_seconds) = (&tokens, 0.0);
            let text = DraftText {
                request,
                tokens,
                sampling,
                nodes_max,
                depth_max,
                probability_min,
                step_seconds,
            };
            let mut trees = [DraftTree::default()];
            drafter.propose(&[text], &mut trees).unwrap();
            let [tree] = trees;
            if let Some(accepted) = answer.filter(|_| !tree.is_empty()) {
                drafter.observe(request, &tree, accepted.min(tree.len()));
            }
            assert!(tree.is_chain());
            (0..tree.len()).map(|node| tree.token(node)).collect::<Vec<_>>()
        };
        assert_eq!(draft(0.3, None), [3, 4], "0.6 to the power of 2 is above 0.3");
        assert_eq!(draft(0.0, None).len(), 20, "as deep as is asked for");
        for _ in 0..9 {
            draft(0.3, Some(30));
        }
        assert!(draft(0.3, None).len() > 8);
        for _ in 0..30 {
            draft(0.3, Some(0));
        }
        assert_eq!(draft(0.3, None), [0; 0]);
        let tried = (0..TRIED_ONE_IN).filter(|_| !draft(0.3, Some(0)).is_empty()).count();
        assert_eq!(tried, 1, "it is tried now and then");
    }
}
