//! `Collective`: what ranks of one model say to each other, and the version for ranks that are
//! threads of one process.
//!
//! A rank runs its own program on its own share of the weights; wherever the program says
//! [`crate::Op::AllReduce`], [`crate::Op::AllGather`] or gathers logits, every rank makes the same
//! call in the same order. Device backends implement the trait over their own links, with
//! buffers staged where they must be.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A rank could not be reached: it failed, or made a different call.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[error("collective: {0}")]
pub struct CollectiveError(pub String);

/// One rank's end of a group of ranks.
pub trait Collective: Send + Sync {
    /// This rank, from 0 on.
    fn rank(&self) -> usize;
    /// How many there are.
    fn ranks(&self) -> usize;
    /// Replaces `values` by the sum over all ranks, added in rank order, so that every rank gets
    /// the same bits each time. All ranks give the same length.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), CollectiveError>;
    /// Fills `whole` with every rank's `part`, rank 0 first; `whole` is `ranks` parts long.
    fn all_gather(&self, part: &[f32], whole: &mut [f32]) -> Result<(), CollectiveError>;
    /// Gives `send[r]` to rank `r` and returns what each rank gave to this one, by rank. Lengths
    /// may differ.
    fn all_to_all(&self, send: &[&[f32]]) -> Result<Vec<Vec<f32>>, CollectiveError>;
}

/// The only rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
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
        whole.copy_from_slice(part);
        Ok(())
    }

    fn all_to_all(&self, send: &[&[f32]]) -> Result<Vec<Vec<f32>>, CollectiveError> {
        Ok(send.iter().map(|part| part.to_vec()).collect())
    }
}

/// What a rank puts on the table: one part for every rank, or one for all.
type Parts = Arc<Vec<Vec<f32>>>;

#[derive(Debug)]
struct Table {
    given: Vec<Option<Parts>>,
    taken: usize,
    gone: Vec<bool>,
}

impl Table {
    /// The call can never be completed: a rank has gone and had not given its part.
    fn missing(&self) -> Option<usize> {
        (0..self.gone.len()).find(|rank| self.gone[*rank] && self.given[*rank].is_none())
    }

    fn is_full(&self) -> bool {
        self.given.iter().all(Option::is_some)
    }
}

#[derive(Debug)]
struct Shared {
    ranks: usize,
    table: Mutex<Table>,
    changed: Condvar,
}

/// A rank that is a thread; ranks exchange copies through one table under a lock. When a rank
/// is dropped, calls of the others that need it fail instead of waiting for ever.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    shared: Arc<Shared>,
}

impl ThreadRank {
    /// A group of `ranks` ends, by rank.
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn group(ranks: usize) -> Vec<ThreadRank> {
        assert!(ranks > 0, "a group has at least one rank");
        let table = Table { given: vec![None; ranks], taken: 0, gone: vec![false; ranks] };
        let shared = Arc::new(Shared { ranks, table: Mutex::new(table), changed: Condvar::new() });
        (0..ranks).map(|rank| ThreadRank { rank, shared: Arc::clone(&shared) }).collect()
    }

    /// Leaves the group: calls of the others that need this rank fail from now on.
    pub fn leave(&self) {
        let mut table = self.shared.table.lock().unwrap_or_else(PoisonError::into_inner);
        // What this rank has already given still counts for the others.
        table.gone[self.rank] = true;
        self.shared.changed.notify_all();
    }

    /// Gives `parts` and returns what every rank gave, by rank. The table is clear again when the
    /// last rank has taken its copies, and only then may a fast rank give for its next call.
    fn exchange(&self, parts: Vec<Vec<f32>>) -> Result<Vec<Parts>, CollectiveError> {
        let shared = &*self.shared;
        let mut table = shared.table.lock().unwrap_or_else(PoisonError::into_inner);
        while table.given[self.rank].is_some() {
            table = shared.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
        table.given[self.rank] = Some(Arc::new(parts));
        shared.changed.notify_all();
        while !table.is_full() {
            if let Some(rank) = table.missing() {
                return Err(CollectiveError(format!("rank {rank} has gone")));
            }
            table = shared.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
        let all = table.given.iter().flatten().cloned().collect();
        table.taken += 1;
        if table.taken == shared.ranks {
            table.taken = 0;
            table.given.fill(None);
            shared.changed.notify_all();
        }
        Ok(all)
    }

    fn same_length(&self, all: &[Parts], expected: usize) -> Result<(), CollectiveError> {
        match all.iter().position(|parts| parts[0].len() != expected) {
            None => Ok(()),
            Some(rank) => Err(CollectiveError(format!(
                "rank {} gave {expected} elements, rank {rank} gave {}",
                self.rank,
                all[rank][0].len()
            ))),
        }
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.shared.ranks
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let all = self.exchange(vec![values.to_vec()])?;
        self.same_length(&all, values.len())?;
        values.copy_from_slice(&all[0][0]);
        for parts in &all[1..] {
            values.iter_mut().zip(&parts[0]).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }

    fn all_gather(&self, part: &[f32], whole: &mut [f32]) -> Result<(), CollectiveError> {
        let all = self.exchange(vec![part.to_vec()])?;
        self.same_length(&all, part.len())?;
        for (parts, out) in all.iter().zip(whole.chunks_mut(part.len().max(1))) {
            out.copy_from_slice(&parts[0]);
        }
        Ok(())
    }

    fn all_to_all(&self, send: &[&[f32]]) -> Result<Vec<Vec<f32>>, CollectiveError> {
        if send.len() != self.shared.ranks {
            return Err(CollectiveError(format!(
                "{} parts for {} ranks",
                send.len(),
                self.shared.ranks
            )));
        }
        let all = self.exchange(send.iter().map(|part| part.to_vec()).collect())?;
        Ok(all.iter().map(|parts| parts[self.rank].clone()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_threads<T: Send>(ranks: usize, run: impl Fn(ThreadRank) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let group = ThreadRank::group(ranks);
            let threads: Vec<_> = group.into_iter().map(|rank| scope.spawn(|| run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_in_rank_order_and_calls_do_not_mix() {
        let results = on_threads(4, |rank| {
            let mut last = Vec::new();
            for call in 0..200 {
                let mut values = vec![rank.rank() as f32 + call as f32, 1e8];
                rank.all_reduce_sum(&mut values).unwrap();
                assert_eq!(values[0], 6.0 + 4.0 * call as f32);
                last = values;
            }
            last
        });
        assert!(results.iter().all(|result| *result == results[0]));
    }

    #[test]
    fn gathers_and_exchanges() {
        on_threads(3, |rank| {
            let me = rank.rank() as f32;
            let mut whole = vec![0.0; 6];
            rank.all_gather(&[me, me + 10.0], &mut whole).unwrap();
            assert_eq!(whole, [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]);
            let long = vec![me; 2];
            let received = rank.all_to_all(&[&long, &long[..1], &[]]).unwrap();
            let expected = [2, 1, 0][rank.rank()];
            assert_eq!(received, [0.0, 1.0, 2.0].map(|from| vec![from; expected]));
        });
    }

    #[test]
    fn a_rank_that_is_gone_is_an_error() {
        let results =
            on_threads(
                2,
                |rank| {
                    if rank.rank() == 0 { Ok(()) } else { rank.all_reduce_sum(&mut [1.0]) }
                },
            );
        assert_eq!(results[1], Err(CollectiveError("rank 0 has gone".to_owned())));
    }

    #[test]
    fn different_lengths_are_an_error() {
        let results = on_threads(2, |rank| rank.all_reduce_sum(&mut vec![1.0; 1 + rank.rank()]));
        assert!(results.iter().all(Result::is_err));
    }
}
