//! Divides one model over several ranks. A program becomes one program for each rank. Its weights
//! are parts of the whole ones, and collectives stand where ranks must agree.
//!
//! The splits are Megatron's (Shoeybi et al., 2019). Linear layers that make heads or hidden
//! elements are split by output row. Linear layers that read them are split by input column, and
//! their outputs are summed. A sum is delayed as long as the ops after it are linear, so that
//! routed and shared experts take one all-reduce together. The use of an output decides how its
//! linear layer is split, not its name:
//!
//! - KV heads are divided as evenly as possible, each with the query heads that read it. If there
//!   are fewer KV heads than ranks, ranks share them, and each keeps its own copy of the cache.
//! - Every rank keeps MLA's latents. The heads' matrices are split.
//! - Experts are split by expert or by hidden column. All ranks hold all rows, so each rank takes
//!   the rows of its experts (dispatch), and the sum combines the results.
//! - Embedding and head are split by vocabulary, and logits are gathered.
//!
//! Experts that are split by expert need no all-to-all. After attention's sum every rank has every
//! row, so dispatch is free, and the sum that combines the experts serves the shared experts too.
//! If rows were divided over ranks, each layer would need two more exchanges. They would save at
//! most the bytes of sums to ranks without one of the token's experts.
//!
//! A norm over a whole row of heads (OLMo 2) needs the other ranks' heads, which are gathered.

mod backend;
mod crew;
mod fit;
mod rewrite;
mod slice;
mod wishes;

use std::ops::Range;

use lathe_tensor::Tensor;

use crate::backend::{BackendError, WeightSource};
use crate::op::Weight;
use crate::program::Program;

pub use backend::{ShardedBackend, ShardedExecutor};
pub use fit::shard_fitting;
pub use slice::slice_tensor;

/// The division of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpertSplit {
    /// Each rank has some whole experts.
    #[default]
    ByExpert,
    /// Each rank has some hidden elements of every expert.
    ByColumn,
}

/// The division of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardOptions {
    /// The number of ranks.
    pub ranks: usize,
    /// The division of experts.
    pub experts: ExpertSplit,
    /// Whether embedding and head are divided too.
    pub vocabulary: bool,
    /// Borders of hidden elements are multiples of this, so that no block of the weights' formats
    /// is cut. It is the least common multiple of their block lengths ([`shard_fitting`] computes
    /// it).
    pub alignment: usize,
}

impl ShardOptions {
    /// Divides everything, with whole experts on each rank, for formats without blocks.
    pub fn new(ranks: usize) -> Self {
        Self { ranks, experts: ExpertSplit::default(), vocabulary: true, alignment: 1 }
    }
}

/// The reason why a program cannot be divided.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[error("cannot divide over {ranks} ranks: {reason}")]
pub struct ShardError {
    /// Ranks asked for.
    pub ranks: usize,
    /// What prevents it.
    pub reason: String,
}

/// A weight of a rank's program: a part of a weight of the whole program.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightPart {
    /// The whole program's weight.
    pub source: Weight,
    /// The range of each dimension that is kept.
    pub ranges: Vec<Range<usize>>,
}

/// The program of one rank, with its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct RankProgram {
    /// Its program. It runs the same steps as the whole program.
    pub program: Program,
    /// The part for each of its weights.
    pub parts: Vec<WeightPart>,
}

/// Divides `program`. The result has one program for each rank.
///
/// # Errors
/// [`ShardError`] if ranks cannot share KV heads evenly, if something has fewer parts than there
/// are ranks, or if the program is divided already.
pub fn shard(program: &Program, options: &ShardOptions) -> Result<Vec<RankProgram>, ShardError> {
    let fail = |reason| ShardError { ranks: options.ranks, reason };
    if options.ranks == 0 || options.alignment == 0 {
        return Err(fail("ranks and alignment start at 1".to_owned()));
    }
    let wishes = wishes::Wishes::of(program, options).map_err(fail)?;
    let rank = |rank| rewrite::rewrite(program, options, &wishes, rank).map_err(fail);
    (0..options.ranks).map(rank).collect()
}

/// Divides `0 .. n` into `ranks` parts at multiples of `alignment`, as evenly as possible.
fn partition(
    what: &str,
    n: usize,
    ranks: usize,
    alignment: usize,
) -> Result<Vec<Range<usize>>, String> {
    let units = n.div_ceil(alignment);
    let border = |rank: usize| (units * rank / ranks * alignment).min(n);
    let parts: Vec<Range<usize>> = (0..ranks).map(|rank| border(rank)..border(rank + 1)).collect();
    if parts.iter().any(Range::is_empty) {
        return Err(format!("{n} {what} in blocks of {alignment} leave a rank without"));
    }
    Ok(parts)
}

/// The weights of one rank, cut from those of the whole program.
pub struct RankWeights<'a> {
    /// The whole program's weights.
    pub source: &'a dyn WeightSource,
    /// The rank.
    pub rank: &'a RankProgram,
}

impl WeightSource for RankWeights<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let part = &self.rank.parts[weight.0 as usize];
        let whole = self.source.tensor(part.source)?;
        slice_tensor(&whole, &part.ranges).map_err(|reason| BackendError::Weight {
            name: self.rank.program.weight(weight).name.clone(),
            reason,
        })
    }
}
