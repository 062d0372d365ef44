//! `Collective`: the communication between the ranks of one model.
//!
//! A rank runs its own program on its own part of the weights. At each [`crate::Op::AllReduce`],
//! [`crate::Op::AllGather`] and gather of logits, every rank makes the same call in the same order.
//! Buffers belong to the caller, and both sides know the counts. So a device backend can pass the
//! calls on to its own links (NCCL's all-reduce, all-gather, grouped send and receive, and abort).
//! [`ThreadRank`] is the implementation for threads of one process.

use crate::op::Op;
use crate::program::Program;

mod threads;

pub use threads::ThreadRank;

/// An error of the communication between ranks.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum CollectiveError {
    /// A rank left the group: it failed, or was dropped.
    #[error("collective: rank {0} has gone")]
    Gone(usize),
    /// Two ranks made different calls, or a call does not fit the group.
    #[error("collective: {0}")]
    Mismatch(String),
    /// The program was divided over another number of ranks, or belongs to another rank.
    #[error("collective: the program is not that of rank {rank} of {ranks}: {reason}")]
    Program {
        /// The rank that should run it.
        rank: usize,
        /// The number of ranks.
        ranks: usize,
        /// What was found and what was expected.
        reason: String,
    },
}

/// One member of a group of ranks. It makes one call at a time.
pub trait Collective: Send + Sync + std::fmt::Debug {
    /// The type of what is summed and gathered: `[f32]` on the host, device memory elsewhere.
    type Buffer: ?Sized;
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;
    /// The number of ranks.
    fn ranks(&self) -> usize;
    /// Replaces `values` by the sum over all ranks. The group fixes the order of the additions, so
    /// that every rank gets the same bits each time. All ranks give the same length.
    ///
    /// # Errors
    /// [`CollectiveError`] if another rank is gone or made another call.
    fn all_reduce_sum(&self, values: &mut Self::Buffer) -> Result<(), CollectiveError>;
    /// Fills `whole` with every rank's `part`, rank 0 first. `whole` is `ranks` parts long, and all
    /// ranks give the same length.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_gather(
        &self,
        part: &Self::Buffer,
        whole: &mut Self::Buffer,
    ) -> Result<(), CollectiveError>;
    /// Leaves the group for good. Calls of the others that need this rank then fail instead of
    /// waiting, and so do all later ones.
    fn leave(&self);
}

/// A rank with buffers of floats in this process's memory.
pub type HostCollective = dyn Collective<Buffer = [f32]>;

/// The only rank of a group of one.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
    type Buffer = [f32];

    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _values: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&self, part: &[f32], whole: &mut [f32]) -> Result<(), CollectiveError> {
        same_length("parts to gather", part.len(), whole.len())?;
        whole.copy_from_slice(part);
        Ok(())
    }

    fn leave(&self) {}
}

fn same_length(what: &str, found: usize, expected: usize) -> Result<(), CollectiveError> {
    if found == expected {
        return Ok(());
    }
    Err(CollectiveError::Mismatch(format!("{found} {what}, expected {expected}")))
}

/// Checks that this rank of this group can run `program`: each gathered value has the width of all
/// its parts, and the head has this rank's rows.
///
/// # Errors
/// [`CollectiveError::Program`].
pub fn check_program<B: ?Sized>(
    program: &Program,
    collective: &dyn Collective<Buffer = B>,
) -> Result<(), CollectiveError> {
    let (rank, ranks) = (collective.rank(), collective.ranks());
    let check = |op: &Op| match op {
        Op::AllGather { input, out } => {
            let (part, whole) = (program.value_width(*input), program.value_width(*out));
            let name = &program.values[out.0 as usize].name;
            (part * ranks != whole).then(|| format!("{name} gathers {part} of {whole} columns"))
        }
        Op::Logits { head, gather: true, .. } => {
            let found = program.weight(*head).shape[0];
            let expected = vocabulary_part(program.vocabulary, rank, ranks).len();
            (found != expected).then(|| format!("its head has {found} rows, expected {expected}"))
        }
        _ => None,
    };
    match program.ops.iter().find_map(check) {
        None => Ok(()),
        Some(reason) => Err(CollectiveError::Program { rank, ranks, reason }),
    }
}

/// The tokens of `rank` if a vocabulary is divided. All parts have the same width except the last,
/// as gathering requires. Empty if there are too few tokens.
pub fn vocabulary_part(vocabulary: usize, rank: usize, ranks: usize) -> std::ops::Range<usize> {
    let part = vocabulary.div_ceil(ranks);
    (part * rank).min(vocabulary)..(part * (rank + 1)).min(vocabulary)
}
