//! Writes the cache: keys and values of rows become codes at their positions.

use std::ops::Range;

use lathe_program::kv_codec::KvVector;
use lathe_program::{KvLayerShape, SequenceTables, Step};

use super::store::KvStore;
use super::with_store;
use super::{KvCache, LayerPlace};
use crate::lanes::{Kernel, Lanes};
use crate::rows::Rows;

/// Stores rows of a step in the cache.
pub(crate) struct Write<'a> {
    /// The cache to write.
    pub cache: &'a KvCache,
    /// The layer.
    pub layer: &'a LayerPlace,
    /// The step.
    pub step: &'a Step,
    /// The block tables of the step's sequences.
    pub tables: &'a SequenceTables,
    /// The sequence of each row of the step.
    pub sequence_of: &'a [u32],
    /// Keys of all heads, or latents.
    pub first: Rows,
    /// Values of all heads, or rotary keys.
    pub second: Rows,
    /// The rows. Nobody else writes their slots, and nobody reads the cache meanwhile.
    pub rows: Range<usize>,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for row in self.rows.clone() {
            let sequence = &self.step.sequences[self.sequence_of[row] as usize];
            let slot = sequence.cached as usize + row - sequence.first_row as usize;
            let tokens = self.cache.block_tokens;
            let table = self.tables.table(sequence.id, self.layer.group);
            let (page, slot) = table.locate(slot, tokens);
            // SAFETY: the page has room for each slot of the layer's shape, and the rows hold as
            // many elements as the layer stores.
            unsafe {
                with_store!(self.cache.format, S => self.store::<L, S>(row, page as u32, slot))
            };
        }
    }
}

impl Write<'_> {
    /// Stores keys as columns, and values, latents and rotary keys as rows.
    #[inline(always)]
    unsafe fn store<L: Lanes, S: KvStore>(&self, row: usize, page: u32, slot: usize) {
        let (first, second) = (self.first.row(row), self.second.row(row));
        // SAFETY: as the caller promises.
        unsafe {
            match self.layer.shape {
                KvLayerShape::Heads { kv_heads, key_dim, value_dim } => {
                    for head in 0..kv_heads {
                        let [keys, values] = self.cache.planes::<S>(self.layer, page, head);
                        let (key, value) =
                            (first.add(head * key_dim), second.add(head * value_dim));
                        S::put_column::<L>(keys, slot, KvVector::Key, key);
                        S::put_row::<L>(values, slot, KvVector::Value, value);
                    }
                }
                KvLayerShape::Latent { .. } => {
                    let [latents, ropes] = self.cache.planes::<S>(self.layer, page, 0);
                    S::put_row::<L>(latents, slot, KvVector::Key, first);
                    S::put_row::<L>(ropes, slot, KvVector::Key, second);
                }
            }
        }
    }
}
