//! The paged KV cache as the scheduler sees it: page numbers, never memory.

mod cache;
mod pool;
mod prefix;

pub use cache::{KvCache, PrefixHit, SequenceBlocks};
pub use pool::BlockPool;
pub use prefix::PrefixIndex;
