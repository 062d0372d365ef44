//! `Ranks`: this rank's connection to its group, and the memory that gathering needs.
//!
//! A collective puts the parts of the ranks one after another, but values and logits are needed row
//! by row. Buffers are kept from step to step, so a step allocates nothing once one of its size has
//! run. The calling thread talks to the other ranks while the gang waits.

use std::sync::Arc;

use lathe_program::{CollectiveError, HostCollective};

use crate::stage::Stage;

/// One rank's connection to its group, and its buffers.
#[derive(Debug)]
pub(crate) struct Ranks {
    collective: Arc<HostCollective>,
    /// This rank's logits, `[asked, tokens of this rank]`.
    logits: Vec<f32>,
    /// The same, padded to the width of the widest rank.
    padded: Vec<f32>,
    /// The parts of all ranks, one after another.
    gathered: Vec<f32>,
}

impl Ranks {
    /// Memory for what `stages` gather in steps of `rows_max` rows. Memory for logits is taken when
    /// they are asked for.
    pub(crate) fn new(collective: Arc<HostCollective>, stages: &[Stage], rows_max: usize) -> Self {
        let width = stages.iter().map(|stage| match stage {
            Stage::AllGather { out, .. } => out.width(),
            _ => 0,
        });
        let gathered = vec![0.0; rows_max * width.max().unwrap_or(0)];
        Self { collective, logits: Vec::new(), padded: Vec::new(), gathered }
    }

    /// Replaces `values` by the sum over all ranks.
    ///
    /// # Errors
    /// If another rank has gone or made another call.
    pub(crate) fn sum(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.collective.all_reduce_sum(values)
    }

    /// Puts the rows of `width` floats of each rank's `part` side by side in the rows of `whole`. A
    /// row of `whole` has `whole_width` floats and leaves out what the last rank has too many.
    ///
    /// # Errors
    /// As [`Ranks::sum`].
    pub(crate) fn gather(
        &mut self,
        part: &[f32],
        width: usize,
        whole: &mut [f32],
        whole_width: usize,
    ) -> Result<(), CollectiveError> {
        gather(&*self.collective, &mut self.gathered, part, width, whole, whole_width)
    }

    /// Memory for `floats` logits of this rank.
    pub(crate) fn own_logits(&mut self, floats: usize) -> &mut [f32] {
        if self.logits.len() < floats {
            self.logits.resize(floats, 0.0);
        }
        &mut self.logits[..floats]
    }

    /// Puts the logits of all ranks side by side in the rows of `whole`. This rank's logits lie in
    /// [`Ranks::own_logits`] and are `own_width` wide.
    ///
    /// # Errors
    /// As [`Ranks::sum`].
    pub(crate) fn gather_logits(
        &mut self,
        own_width: usize,
        whole: &mut [f32],
        vocabulary: usize,
    ) -> Result<(), CollectiveError> {
        let Self { collective, logits, padded, gathered } = self;
        let (asked, width) = (whole.len() / vocabulary, vocabulary.div_ceil(collective.ranks()));
        let own = &logits[..asked * own_width];
        if own_width == width {
            return gather(&**collective, gathered, own, width, whole, vocabulary);
        }
        padded.resize(asked * width, 0.0);
        for (out, row) in padded.chunks_exact_mut(width).zip(own.chunks_exact(own_width)) {
            out[..own_width].copy_from_slice(row);
        }
        gather(&**collective, gathered, padded, width, whole, vocabulary)
    }
}

fn gather(
    collective: &HostCollective,
    gathered: &mut Vec<f32>,
    part: &[f32],
    width: usize,
    whole: &mut [f32],
    whole_width: usize,
) -> Result<(), CollectiveError> {
    let floats = part.len() * collective.ranks();
    if gathered.len() < floats {
        gathered.resize(floats, 0.0);
    }
    let by_rank = &mut gathered[..floats];
    collective.all_gather(part, by_rank)?;
    for (rank, given) in by_rank.chunks_exact(part.len().max(1)).enumerate() {
        let start = (rank * width).min(whole_width);
        let columns = start..(start + width).min(whole_width);
        let rows = given.chunks_exact(width).zip(whole.chunks_exact_mut(whole_width));
        rows.for_each(|(from, to)| to[columns.clone()].copy_from_slice(&from[..columns.len()]));
    }
    Ok(())
}
