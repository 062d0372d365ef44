//! The paged KV cache: one allocation, pages of `block_tokens` positions of every layer of a group.
//!
//! Within a page each layer has its own region, and within that each head. Keys are stored
//! transposed, `[key_dim, block_tokens]`, so that sixteen lanes compute the scores of sixteen
//! positions without a sum across lanes. Values are stored `[block_tokens, value_dim]`, so that the
//! weighted sum of values runs over lanes too. Latents (MLA) are keys and values at once and are
//! stored `[block_tokens, rank + rope_dim]`. The arithmetic of attention is in `attend`.

pub(crate) mod code;
pub(crate) mod int4;
mod moves;
mod read;
pub(crate) mod store;
mod write;

use lathe_program::{BackendError, KvFormat, KvLayerShape, KvLayout};

use crate::memory::{ALIGNMENT, Memory};
use store::{KvStore, Plane};

pub(crate) use read::{LoadScales, LoadTile, PageRun, TILE, TileBuffers, page_runs};
pub(crate) use write::Write;

/// Evaluates `$body`, in which `$store` names the [`KvStore`] of a format.
macro_rules! with_store {
    ($format:expr, $store:ident => $body:expr) => {
        match $format {
            lathe_program::KvFormat::F32 => {
                type $store = $crate::cache::code::F32;
                $body
            }
            lathe_program::KvFormat::F16 => {
                type $store = $crate::cache::code::F16;
                $body
            }
            lathe_program::KvFormat::BF16 => {
                type $store = $crate::cache::code::Bf16;
                $body
            }
            lathe_program::KvFormat::Int16 => {
                type $store = $crate::cache::code::I16;
                $body
            }
            lathe_program::KvFormat::Int8 => {
                type $store = $crate::cache::code::I8;
                $body
            }
            lathe_program::KvFormat::F8E4M3 => {
                type $store = $crate::cache::code::E4m3;
                $body
            }
            lathe_program::KvFormat::Int4 => {
                type $store = $crate::cache::int4::Int4;
                $body
            }
        }
    };
}
pub(crate) use with_store;

/// The place of a layer within a page.
#[derive(Debug, Clone)]
pub(crate) struct LayerPlace {
    /// Bytes from the start of a page to the layer's region.
    pub offset: usize,
    /// The vectors that it stores.
    pub shape: KvLayerShape,
    /// The KV group, which has a block table.
    pub group: usize,
}

impl LayerPlace {
    /// The elements of a head's key and of its value, or of a latent and of its rotary key.
    #[inline(always)]
    pub(crate) fn dims(&self) -> (usize, usize) {
        match self.shape {
            KvLayerShape::Heads { key_dim, value_dim, .. } => (key_dim, value_dim),
            KvLayerShape::Latent { rank, rope_dim } => (rank, rope_dim),
        }
    }
}

/// The cache of one executor.
#[derive(Debug)]
pub(crate) struct KvCache {
    memory: Memory,
    format: KvFormat,
    block_tokens: usize,
    page_bytes: usize,
    pages: usize,
    layers: Vec<LayerPlace>,
}

impl KvCache {
    /// An empty cache of `pages` pages.
    ///
    /// # Errors
    /// [`BackendError::Memory`] if there is not enough, [`BackendError::Unsupported`] for a
    /// format that these kernels do not read.
    pub(crate) fn new(
        layout: &KvLayout,
        format: KvFormat,
        pages: usize,
    ) -> Result<Self, BackendError> {
        code::check(format, layout)?;
        let mut layers: Vec<LayerPlace> = layout
            .layers
            .iter()
            .map(|l| LayerPlace { offset: 0, shape: l.shape, group: l.group as usize })
            .collect();
        let mut page_bytes = 0usize;
        for group in &layout.groups {
            let mut offset = 0;
            for &layer in &group.layers {
                layers[layer as usize].offset = offset;
                let shape = layers[layer as usize].shape;
                offset += layout.block_tokens * shape.bytes_per_token(format);
            }
            page_bytes = page_bytes.max(offset);
        }
        let page_bytes = page_bytes.next_multiple_of(ALIGNMENT);
        let bytes = page_bytes.saturating_mul(pages);
        let memory = Memory::zeroed(bytes, "the KV cache")?;
        Ok(Self { memory, format, block_tokens: layout.block_tokens, page_bytes, pages, layers })
    }

    /// Bytes of all pages.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The format of the numbers.
    pub(crate) fn format(&self) -> KvFormat {
        self.format
    }

    /// Positions in a page.
    pub(crate) fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// The place of `layer`.
    pub(crate) fn layer(&self, layer: usize) -> &LayerPlace {
        &self.layers[layer]
    }

    /// The keys and the values of a head in a page, or the latents and the rotary keys, which count
    /// as one head. The region has the codes of the first, the codes of the second, the scales of
    /// the first and the scales of the second.
    #[inline(always)]
    pub(crate) fn planes<S: KvStore>(
        &self,
        layer: &LayerPlace,
        page: u32,
        head: usize,
    ) -> [Plane; 2] {
        let (first, second) = layer.dims();
        let tokens = self.block_tokens;
        let mut at = self.region(layer, page).wrapping_add(
            head * tokens
                * (S::code_bytes(first)
                    + S::code_bytes(second)
                    + S::scale_bytes(first)
                    + S::scale_bytes(second)),
        );
        let mut take = |bytes: usize| {
            let here = at;
            at = at.wrapping_add(tokens * bytes);
            here
        };
        let codes = [take(S::code_bytes(first)), take(S::code_bytes(second))];
        let scales = [take(S::scale_bytes(first)), take(S::scale_bytes(second))];
        [
            Plane { codes: codes[0], scales: scales[0], tokens, dims: first },
            Plane { codes: codes[1], scales: scales[1], tokens, dims: second },
        ]
    }

    /// The region of `layer` in `page`.
    fn region(&self, layer: &LayerPlace, page: u32) -> *mut u8 {
        assert!((page as usize) < self.pages, "page {page} of {}", self.pages);
        // SAFETY: the page lies within the memory and the layer's region within a page.
        unsafe { self.memory.pointer().add(page as usize * self.page_bytes + layer.offset) }
    }
}
