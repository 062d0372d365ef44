//! `StackedDrafter`: drafters by turns, for each text the first one that has something.

use lathe_program::BackendError;

use super::{DraftText, DraftTree, Drafter};
use crate::request::RequestId;

/// Asks a drafter for the texts that all drafters before it had nothing for.
pub struct StackedDrafter {
    drafters: Vec<Box<dyn Drafter>>,
    /// Requests whose last tree is of each drafter.
    authors: Vec<Vec<RequestId>>,
}

impl StackedDrafter {
    /// The cheapest drafter first.
    pub fn new(drafters: Vec<Box<dyn Drafter>>) -> Self {
        let authors = vec![Vec::new(); drafters.len()];
        Self { drafters, authors }
    }
}

impl Drafter for StackedDrafter {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        for (drafter, authored) in self.drafters.iter_mut().zip(&mut self.authors) {
            let left: Vec<usize> = (0..texts.len()).filter(|at| trees[*at].is_empty()).collect();
            if left.is_empty() {
                return Ok(());
            }
            let own: Vec<DraftText<'_>> = left.iter().map(|at| texts[*at]).collect();
            let mut made = vec![DraftTree::default(); own.len()];
            drafter.propose(&own, &mut made)?;
            authored.retain(|request| !texts.iter().any(|text| text.request == *request));
            for (at, tree) in left.into_iter().zip(made).filter(|(_, tree)| !tree.is_empty()) {
                authored.push(texts[at].request);
                trees[at] = tree;
            }
        }
        Ok(())
    }

    fn observe(&mut self, request: RequestId, tree: &DraftTree, accepted: usize) {
        for (drafter, authored) in self.drafters.iter_mut().zip(&self.authors) {
            if authored.contains(&request) {
                drafter.observe(request, tree, accepted);
            }
        }
    }

    fn forget(&mut self, request: RequestId) {
        self.drafters.iter_mut().for_each(|drafter| drafter.forget(request));
        self.authors.iter_mut().for_each(|authored| authored.retain(|it| *it != request));
    }
}
