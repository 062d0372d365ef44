//! Drafts: what may follow a text, verified in one step of the model.
//!
//! **Lossless by construction.** A step chooses a token after each drafted row, by the request's
//! own sampling, seed and counter (the position of the token in its text). A drafted token is
//! accepted if it is the token that was chosen at its place. So the tokens of a request are those
//! of plain decoding, at any temperature and with penalties, biases and masks, wherever the
//! model's logits are the same. A drafted token is accepted with the probability that the model
//! gives it, and a set of siblings with the sum of theirs. That is what the rejection rule of
//! SpecInfer (arXiv 2305.09781, section 4.3) gives for drafts that are not drawn at random. A
//! drafter that draws uses the request's random numbers, so that it draws what the model draws
//! where both agree.
//!
//! **Only when it pays.** The engine measures what one more row costs a step, and says at which
//! probability of acceptance a node pays ([`DraftText::probability_min`]). The more sequences a
//! step has, the higher that is, so that a busy engine drafts nothing by itself.

mod acceptance;
mod cost;
mod eagle;
mod lookup;
mod model;
mod stacked;
mod tree;

use lathe_program::{BackendError, Sampling};

use crate::request::RequestId;
pub(crate) use cost::StepCost;
pub use eagle::EagleDrafter;
pub use lookup::LookupDrafter;
pub use model::ModelDrafter;
pub use stacked::StackedDrafter;
pub use tree::DraftTree;

/// A text that a draft is wanted for.
#[derive(Debug, Clone, Copy)]
pub struct DraftText<'a> {
    /// Whose.
    pub request: RequestId,
    /// All tokens that are known: prompt and answer so far.
    pub tokens: &'a [u32],
    /// How the request's tokens are chosen.
    pub sampling: Sampling,
    /// Nodes of the tree at most, at least 1.
    pub nodes_max: usize,
    /// Nodes on a path from the root at most, at least 1.
    pub depth_max: usize,
    /// A node pays if it is accepted with at least this probability: what its row costs the step,
    /// as measured, beside what the step makes without it.
    pub probability_min: f64,
    /// What a step without drafts takes, in seconds; 0 before any was measured.
    pub step_seconds: f64,
}

/// Proposes what may follow texts.
pub trait Drafter: Send {
    /// Fills the tree of each text, which is empty. An empty tree stays a plain step.
    ///
    /// # Errors
    /// If the drafter's own model failed. No request advances by that step.
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError>;

    /// Whether it drafts from what the model makes of a text: [`Self::features`].
    fn reads_features(&self) -> bool {
        false
    }

    /// Hears what the taps of the model's program made of a text's rows, which are known tokens at
    /// the positions from `first` on: `[rows, width of all taps]`, a row's taps side by side.
    fn features(&mut self, request: RequestId, first: usize, rows: &[f32]) {
        let _ = (request, first, rows);
    }

    /// Hears how many nodes of a request's tree were accepted.
    fn observe(&mut self, request: RequestId, tree: &DraftTree, accepted: usize) {
        let _ = (request, tree, accepted);
    }

    /// Forgets a request that is over.
    fn forget(&mut self, request: RequestId) {
        let _ = request;
    }
}
