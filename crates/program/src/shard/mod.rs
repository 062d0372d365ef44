//! One model over several ranks: a program becomes one program a rank, with weights that are
//! parts of the whole ones and collectives where ranks must agree.
//!
//! The splits are Megatron's (Shoeybi et al., 2019): linears that make heads or hidden elements
//! are split by output row, those that read them by input column, and what they make is summed.
//! Sums are put off as long as what follows is linear: routed and shared experts take one
//! all-reduce together. Which linear is which follows from what its output is used for, not from
//! its name:
//!
//! - KV heads go to ranks as evenly as they can, each with the query heads that read it; where
//!   there are fewer KV heads than ranks, ranks share them and each keeps its own copy of the
//!   cache;
//! - latents of MLA are kept by every rank, the heads' matrices are split;
//! - experts are split by expert or by hidden column; as all ranks hold all rows, each rank takes
//!   the rows of its experts (dispatch) and the sum combines them;
//! - embedding and head are split by vocabulary, and logits are gathered.
//!
//! Experts that are split by expert are run without an all-to-all: after attention's sum every rank
//! has every row, so dispatching is free, and the sum that combines them serves the shared experts
//! too. Rows that are themselves divided over ranks would need two exchanges more a layer to save
//! at most the bytes that more ranks than experts a token would sum in vain.
//!
//! A norm over a whole row of heads (OLMo 2) needs the others' heads: they are gathered for it.

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

/// How experts are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpertSplit {
    /// Each rank has some experts whole.
    #[default]
    ByExpert,
    /// Each rank has some hidden elements of every expert.
    ByColumn,
}

/// How a program is divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardOptions {
    /// Ranks.
    pub ranks: usize,
    /// How experts are divided.
    pub experts: ExpertSplit,
    /// Whether embedding and head are divided too.
    pub vocabulary: bool,
    /// Hidden elements are divided at multiples of this, so that no block of the weights' formats
    /// is cut: the least common multiple of their block lengths ([`shard_fitting`] finds it).
    pub alignment: usize,
}

impl ShardOptions {
    /// Everything divided, experts by expert, formats without blocks.
    pub fn new(ranks: usize) -> Self {
        Self { ranks, experts: ExpertSplit::default(), vocabulary: true, alignment: 1 }
    }
}

/// Why a program cannot be divided.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[error("cannot divide over {ranks} ranks: {reason}")]
pub struct ShardError {
    /// Ranks asked for.
    pub ranks: usize,
    /// What stands in the way.
    pub reason: String,
}

/// A weight of a rank's program, as a part of one of the whole program's.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightPart {
    /// The whole program's weight.
    pub source: Weight,
    /// What is kept of each dimension.
    pub ranges: Vec<Range<usize>>,
}

/// What one rank runs.
#[derive(Debug, Clone, PartialEq)]
pub struct RankProgram {
    /// Its program; steps mean the same to it as to the whole program.
    pub program: Program,
    /// For each of its weights.
    pub parts: Vec<WeightPart>,
}

/// Divides `program`; the result is by rank.
///
/// # Errors
/// [`ShardError`] where ranks cannot share KV heads evenly, there is less of something than ranks,
/// or the program is divided already.
pub fn shard(program: &Program, options: &ShardOptions) -> Result<Vec<RankProgram>, ShardError> {
    let fail = |reason| ShardError { ranks: options.ranks, reason };
    if options.ranks == 0 || options.alignment == 0 {
        return Err(fail("ranks and alignment start at 1".to_owned()));
    }
    let wishes = wishes::Wishes::of(program, options).map_err(fail)?;
    let rank = |rank| rewrite::rewrite(program, options, &wishes, rank).map_err(fail);
    (0..options.ranks).map(rank).collect()
}

/// `0 .. n` in `ranks` parts at multiples of `alignment`, as even as that allows.
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
