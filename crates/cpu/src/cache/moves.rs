//! Moves a token's codes from slot to slot. An accepted branch of a draft tree is kept in this way.

use lathe_program::KvLayerShape;

use super::store::{KvStore, Plane};
use super::with_store;
use super::{KvCache, LayerPlace};

impl KvCache {
    /// Copies the contents of a slot to another slot, in all layers of a group. Pages and places
    /// are those of [`lathe_program::BlockTable::locate`].
    ///
    /// # Panics
    /// If there is no such page or place.
    pub(crate) fn copy_slot(&mut self, group: usize, from: (usize, usize), to: (usize, usize)) {
        assert!(from.1 < self.block_tokens && to.1 < self.block_tokens, "places in a page");
        for layer in self.layers.iter().filter(|layer| layer.group == group) {
            // SAFETY: the places were checked, `planes` checks the pages, and nobody else uses the
            // cache, which is borrowed mutably.
            unsafe { with_store!(self.format, S => self.copy_layer::<S>(layer, from, to)) };
        }
    }

    unsafe fn copy_layer<S: KvStore>(
        &self,
        layer: &LayerPlace,
        from: (usize, usize),
        to: (usize, usize),
    ) {
        // Keys of heads are columns, everything else is rows.
        let (heads, in_columns) = match layer.shape {
            KvLayerShape::Heads { kv_heads, .. } => (kv_heads, true),
            KvLayerShape::Latent { .. } => (1, false),
        };
        for head in 0..heads {
            let [from_first, from_second] = self.planes::<S>(layer, from.0 as u32, head);
            let [to_first, to_second] = self.planes::<S>(layer, to.0 as u32, head);
            // SAFETY: as the caller promises.
            unsafe {
                copy_vector::<S>(in_columns, (from_first, from.1), (to_first, to.1));
                copy_vector::<S>(false, (from_second, from.1), (to_second, to.1));
            }
        }
    }
}

/// Copies a vector and its scales.
///
/// # Safety
/// The planes lie in pages and have the slots; nobody else touches them.
unsafe fn copy_vector<S: KvStore>(in_columns: bool, from: (Plane, usize), to: (Plane, usize)) {
    let Plane { tokens, dims, .. } = from.0;
    let copy = |from: *const u8, from_slot: usize, to: *mut u8, to_slot: usize, bytes, unit| {
        let (count, size, stride) =
            if in_columns { (bytes / unit, unit, tokens * unit) } else { (1, bytes, 0) };
        for i in 0..count {
            let from = from.wrapping_add(i * stride + from_slot * size);
            let to = to.wrapping_add(i * stride + to_slot * size);
            // SAFETY: a plane holds `bytes` bytes for each of its slots, `unit` of them side by
            // side in columns and all of them in rows.
            unsafe { std::ptr::copy(from, to, size) };
        }
    };
    copy(from.0.codes, from.1, to.0.codes, to.1, S::code_bytes(dims), S::CODE_UNIT);
    let bytes = S::scale_bytes(dims) / S::SCALE_PLANES;
    for part in 0..S::SCALE_PLANES {
        let start = part * tokens * bytes;
        let (from_scales, to_scales) =
            (from.0.scales.wrapping_add(start), to.0.scales.wrapping_add(start));
        copy(from_scales, from.1, to_scales, to.1, bytes, S::SCALE_UNIT);
    }
}
