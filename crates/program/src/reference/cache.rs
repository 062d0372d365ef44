//! The paged cache in `f32`: one pool of equal pages, as on a device. So a wrong block table reads
//! another sequence's numbers here too.

use crate::backend::BackendError;
use crate::kv::{KvFormat, KvLayout};
use crate::kv_codec::{KvVector, round_trip};
use crate::op::KvLayer;
use crate::tables::BlockTable;

/// Bytes of a number in this cache.
const F32_BYTES: usize = 4;

pub(super) struct Cache {
    layout: KvLayout,
    format: KvFormat,
    page: usize,
    cells: Vec<f32>,
}

impl Cache {
    pub(super) fn new(
        layout: &KvLayout,
        blocks: usize,
        format: KvFormat,
    ) -> Result<Self, BackendError> {
        let page = layout.page_bytes(KvFormat::F32) / F32_BYTES;
        let bytes = blocks.saturating_mul(page).saturating_mul(F32_BYTES);
        let mut cells: Vec<f32> = Vec::new();
        cells
            .try_reserve_exact(blocks.saturating_mul(page))
            .map_err(|_| BackendError::Memory { what: "the KV cache", bytes })?;
        cells.resize(blocks * page, 0.0);
        Ok(Self { layout: layout.clone(), format, page, cells })
    }

    pub(super) fn format(&self) -> KvFormat {
        self.format
    }

    pub(super) fn bytes(&self) -> usize {
        self.cells.len() * F32_BYTES
    }

    /// Stores one token's vectors, `first` (keys or a latent) and `second` (values or a rotary
    /// key).
    pub(super) fn write(
        &mut self,
        layer: KvLayer,
        table: &BlockTable,
        slot: usize,
        first: &[f32],
        second: &[f32],
    ) {
        let shape = self.layout.layer(layer).shape;
        let [(_, first_len), (_, second_len)] = shape.vectors();
        let second_kind = match shape {
            crate::kv::KvLayerShape::Heads { .. } => KvVector::Value,
            crate::kv::KvLayerShape::Latent { .. } => KvVector::Key,
        };
        let (start, format) = (self.start(layer, table, slot), self.format);
        let cells = &mut self.cells[start..start + first.len() + second.len()];
        let (first_cells, second_cells) = cells.split_at_mut(first.len());
        first_cells.copy_from_slice(first);
        second_cells.copy_from_slice(second);
        for vector in first_cells.chunks_mut(first_len) {
            round_trip(format, KvVector::Key, vector);
        }
        for vector in second_cells.chunks_mut(second_len) {
            round_trip(format, second_kind, vector);
        }
    }

    /// Reads what [`Self::write`] stored: `first` and `second`.
    pub(super) fn read(&self, layer: KvLayer, table: &BlockTable, slot: usize) -> (&[f32], &[f32]) {
        let [first, second] =
            self.layout.layer(layer).shape.vectors().map(|(count, elements)| count * elements);
        let start = self.start(layer, table, slot);
        self.cells[start..start + first + second].split_at(first)
    }

    /// Copies slot `from` to slot `to` in all layers of a group.
    pub(super) fn copy_slot(&mut self, group: usize, table: &BlockTable, from: usize, to: usize) {
        for index in 0..self.layout.layers.len() {
            let layer = KvLayer(index as u32);
            let decl = self.layout.layer(layer);
            if decl.group as usize == group {
                let elements = decl.shape.elements_per_token();
                let (from, to) = (self.start(layer, table, from), self.start(layer, table, to));
                self.cells.copy_within(from..from + elements, to);
            }
        }
    }

    fn start(&self, layer: KvLayer, table: &BlockTable, slot: usize) -> usize {
        let (page, place) = table.locate(slot, self.layout.block_tokens);
        let elements = self.layout.layer(layer).shape.elements_per_token();
        let offset = self.layout.slot_offset(layer, KvFormat::F32) / F32_BYTES;
        page * self.page + offset + place * elements
    }
}
