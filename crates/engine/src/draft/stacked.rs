//! `StackedDrafter`: drafters by turns, for each text the first one that has something.

use std::collections::BTreeMap;

use lathe_program::BackendError;

use super::{DraftText, DraftTree, Drafter};
use crate::request::RequestId;

/// Asks a drafter for the texts that all drafters before it had nothing for.
pub struct StackedDrafter {
    drafters: Vec<Box<dyn Drafter>>,
    /// The drafter that the last tree of a request is of, by its place.
    authors: BTreeMap<RequestId, usize>,
}

impl StackedDrafter {
    /// The cheapest drafter first.
    pub fn new(drafters: Vec<Box<dyn Drafter>>) -> Self {
        Self { drafters, authors: BTreeMap::new() }
    }
}

impl Drafter for StackedDrafter {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        for (author, drafter) in self.drafters.iter_mut().enumerate() {
            let left: Vec<usize> = (0..texts.len()).filter(|at| trees[*at].is_empty()).collect();
            if left.is_empty() {
                return Ok(());
            }
            let own: Vec<DraftText<'_>> = left.iter().map(|at| texts[*at]).collect();
            let mut made = vec![DraftTree::default(); own.len()];
            drafter.propose(&own, &mut made)?;
            for (at, tree) in left.into_iter().zip(made).filter(|(_, tree)| !tree.is_empty()) {
                self.authors.insert(texts[at].request, author);
                trees[at] = tree;
            }
        }
        Ok(())
    }

    fn reads_features(&self) -> bool {
        self.drafters.iter().any(|drafter| drafter.reads_features())
    }

    fn features(&mut self, request: RequestId, first: usize, rows: &[f32]) {
        self.drafters.iter_mut().for_each(|drafter| drafter.features(request, first, rows));
    }

    fn observe(&mut self, request: RequestId, tree: &DraftTree, accepted: usize) {
        if let Some(author) = self.authors.get(&request) {
            self.drafters[*author].observe(request, tree, accepted);
        }
    }

    fn forget(&mut self, request: RequestId) {
        self.drafters.iter_mut().for_each(|drafter| drafter.forget(request));
        self.authors.remove(&request);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Drafts one token of texts of an even length, or of any, and notes what it hears.
    struct Parrot {
        any: bool,
        heard: Arc<Mutex<usize>>,
    }

    impl Drafter for Parrot {
        fn propose(
            &mut self,
            texts: &[DraftText<'_>],
            trees: &mut [DraftTree],
        ) -> Result<(), BackendError> {
            for (text, tree) in texts.iter().zip(trees) {
                if self.any || text.tokens.len().is_multiple_of(2) {
                    tree.push(None, 1);
                }
            }
            Ok(())
        }

        fn observe(&mut self, _: RequestId, _: &DraftTree, _: usize) {
            *self.heard.lock().unwrap() += 1;
        }
    }

    #[test]
    fn only_the_author_of_a_tree_hears_of_it() {
        let heard: [Arc<Mutex<usize>>; 2] = Default::default();
        let parrot = |at: usize| -> Box<dyn Drafter> {
            Box::new(Parrot { any: at == 1, heard: Arc::clone(&heard[at]) })
        };
        let mut stacked = StackedDrafter::new(vec![parrot(0), parrot(1)]);
        let request = RequestId(0);
        for (length, expected) in [(3, [0, 1]), (4, [1, 1]), (6, [2, 1]), (7, [2, 2])] {
            let text = DraftText {
                request,
                tokens: &[7; 8][..length],
                sampling: Default::default(),
                nodes_max: 4,
                depth_max: 4,
                probability_min: 0.0,
                step_seconds: 0.0,
            };
            let mut trees = [DraftTree::default()];
            stacked.propose(&[text], &mut trees).unwrap();
            stacked.observe(request, &trees[0], 0);
            let found = heard.each_ref().map(|heard| *heard.lock().unwrap());
            assert_eq!(found, expected, "after a text of {length} tokens");
        }
    }
}
