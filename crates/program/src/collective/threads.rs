//! Ranks that are threads of one process.
//!
//! Each rank has a slot. A call copies the rank's values into its own slot, meets the others at a
//! spinning barrier, and reads their slots. There are two sets of slots, which calls use
//! alternately. A fast rank writes the other set while slow ones still read this one. It cannot be
//! two calls ahead, so one barrier for each call is enough. Slots keep their memory, so after the
//! largest call nothing is allocated. Every rank adds in rank order. For few ranks, reading every
//! slot costs less than the two additional barriers of a divided sum.
//!
//! The barrier is one atomic word: the number of arrived ranks, the number of the call, and whether
//! a rank has left. A rank that leaves sets its bit in that word. So for all who wait in it, a call
//! either completes or fails.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::{Collective, CollectiveError, same_length};

/// Iterations of the waiting loop before a rank with its own core offers the core to others.
const SPINS: u32 = 1 << 12;
const ARRIVED: u64 = 0xffff;
const FAILED: u64 = 1 << 16;
const CALL: u32 = 17;

/// The call of a rank. All ranks must make the same call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Call {
    #[default]
    None,
    Reduce(usize),
    Gather(usize),
}

/// The values that a rank contributes to a call.
#[derive(Debug, Default)]
struct Slot {
    call: Call,
    values: Vec<f32>,
}

#[derive(Debug)]
struct Shared {
    /// By turn, then by rank.
    slots: [Vec<RwLock<Slot>>; 2],
    /// Ranks that have arrived (16 bits), whether a rank has left (1 bit), and the number of the
    /// call.
    barrier: AtomicU64,
    /// The first rank that left.
    gone: AtomicUsize,
    /// Whether there are more threads than cores. Waiting ranks then yield their core.
    crowded: bool,
}

/// A rank that is a thread. After a rank is dropped, calls of the others that need it fail instead
/// of waiting for ever.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    ranks: usize,
    shared: Arc<Shared>,
}

impl ThreadRank {
    /// A group of `ranks` members, by rank, which compute on `threads` threads together. If there
    /// are more threads than cores, waiting ranks yield their core at once.
    ///
    /// # Panics
    /// If `ranks` is 0 or more than 65,535.
    pub fn group(ranks: usize, threads: usize) -> Vec<ThreadRank> {
        assert!((1..=ARRIVED as usize).contains(&ranks), "a group has 1 to 65,535 ranks");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let slots = || (0..ranks).map(|_| RwLock::default()).collect();
        let shared = Arc::new(Shared {
            slots: [slots(), slots()],
            barrier: AtomicU64::new(0),
            gone: AtomicUsize::new(usize::MAX),
            crowded: threads.max(ranks) > cores,
        });
        (0..ranks).map(|rank| ThreadRank { rank, ranks, shared: Arc::clone(&shared) }).collect()
    }

    /// Contributes `values` to call `call`, and returns every rank's slot after all have
    /// contributed.
    fn meet(&self, call: Call, values: &[f32]) -> Result<&[RwLock<Slot>], CollectiveError> {
        // The number changes only when a call completes that this rank takes part in.
        let number = self.shared.barrier.load(Ordering::Acquire) >> CALL;
        let slots = &self.shared.slots[(number & 1) as usize];
        {
            let mut slot = slots[self.rank].write().unwrap_or_else(PoisonError::into_inner);
            slot.call = call;
            slot.values.clear();
            slot.values.extend_from_slice(values);
        }
        self.shared.arrive(self.ranks as u64)?;
        match (0..self.ranks).find(|rank| read(&slots[*rank]).call != call) {
            None => Ok(slots),
            Some(rank) => {
                let other = read(&slots[rank]).call;
                let reason =
                    format!("rank {} made {call:?}, rank {rank} made {other:?}", self.rank);
                Err(CollectiveError::Mismatch(reason))
            }
        }
    }
}

fn read(slot: &RwLock<Slot>) -> RwLockReadGuard<'_, Slot> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Waits until all `ranks` have arrived at this call.
    fn arrive(&self, ranks: u64) -> Result<(), CollectiveError> {
        let mut state = self.barrier.load(Ordering::Acquire);
        loop {
            if state & FAILED != 0 {
                return Err(self.gone());
            }
            let last = (state & ARRIVED) + 1 == ranks;
            let next = if last { ((state >> CALL) + 1) << CALL } else { state + 1 };
            let swap = self.barrier.compare_exchange_weak(
                state,
                next,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match swap {
                Ok(_) if last => return Ok(()),
                Ok(_) => return self.wait(state >> CALL),
                Err(found) => state = found,
            }
        }
    }

    /// Waits until call `number` has completed or cannot complete.
    fn wait(&self, number: u64) -> Result<(), CollectiveError> {
        let mut spins = 0;
        loop {
            let state = self.barrier.load(Ordering::Acquire);
            // A completed call counts, even if a rank has left since.
            if state >> CALL != number {
                return Ok(());
            }
            if state & FAILED != 0 {
                return Err(self.gone());
            }
            if self.crowded || spins > SPINS {
                std::thread::yield_now();
            } else {
                spins += 1;
                std::hint::spin_loop();
            }
        }
    }

    fn gone(&self) -> CollectiveError {
        CollectiveError::Gone(self.gone.load(Ordering::Relaxed))
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Collective for ThreadRank {
    type Buffer = [f32];

    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let slots = self.meet(Call::Reduce(values.len()), values)?;
        values.copy_from_slice(&read(&slots[0]).values);
        for slot in &slots[1..] {
            values.iter_mut().zip(&read(slot).values).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }

    fn all_gather(&self, part: &[f32], whole: &mut [f32]) -> Result<(), CollectiveError> {
        same_length("floats to gather into", whole.len(), part.len() * self.ranks)?;
        let slots = self.meet(Call::Gather(part.len()), part)?;
        for (slot, out) in slots.iter().zip(whole.chunks_exact_mut(part.len().max(1))) {
            out.copy_from_slice(&read(slot).values);
        }
        Ok(())
    }

    fn leave(&self) {
        // The first rank that left is the cause. The barrier's release publishes it.
        let first = self.shared.gone.compare_exchange(
            usize::MAX,
            self.rank,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        if first.is_ok() {
            self.shared.barrier.fetch_or(FAILED, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_threads<T: Send>(ranks: usize, run: impl Fn(ThreadRank) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let group = ThreadRank::group(ranks, ranks);
            let threads: Vec<_> = group.into_iter().map(|rank| scope.spawn(|| run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_in_rank_order_and_calls_do_not_mix() {
        let results = on_threads(4, |rank| {
            let mut last = Vec::new();
            for call in 0..2000 {
                // The sum of these numbers depends on the order, and only rank order gives these
                // bits.
                let given = [1.0, 1e8, -1e8, 3.0][rank.rank()];
                let mut values = vec![rank.rank() as f32 + call as f32, given];
                rank.all_reduce_sum(&mut values).unwrap();
                assert_eq!(values, [6.0 + 4.0 * call as f32, ((1.0 + 1e8) - 1e8) + 3.0]);
                last = values;
            }
            last
        });
        assert!(results.iter().all(|result| *result == results[0]));
    }

    #[test]
    fn gathers_in_rank_order() {
        on_threads(3, |rank| {
            let me = rank.rank() as f32;
            let mut whole = vec![0.0; 6];
            rank.all_gather(&[me, me + 10.0], &mut whole).unwrap();
            assert_eq!(whole, [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]);
        });
    }

    #[test]
    fn a_rank_that_is_gone_is_an_error() {
        let results = on_threads(3, |rank| {
            let mut values = [1.0];
            // A call that the leaving rank joined still completes for all.
            rank.all_reduce_sum(&mut values)?;
            assert_eq!(values, [3.0]);
            if rank.rank() == 1 { Ok(()) } else { rank.all_reduce_sum(&mut values) }
        });
        assert_eq!(results[0], Err(CollectiveError::Gone(1)));
        assert_eq!(results[2], Err(CollectiveError::Gone(1)));
    }

    #[test]
    fn different_calls_are_an_error_on_all() {
        let lengths = on_threads(2, |rank| rank.all_reduce_sum(&mut vec![1.0; 1 + rank.rank()]));
        assert!(lengths.iter().all(Result::is_err), "{lengths:?}");
        let kinds = on_threads(2, |rank| match rank.rank() {
            0 => rank.all_reduce_sum(&mut [1.0]),
            _ => rank.all_gather(&[1.0], &mut [0.0; 2]),
        });
        assert!(kinds.iter().all(Result::is_err), "{kinds:?}");
    }
}
