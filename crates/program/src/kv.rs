//! The shape of the paged KV cache, shared by the engine (which hands out blocks) and the
//! backends (which own the memory).
//!
//! One pool of equal pages serves every kind of layer. Layers that keep the same positions (all
//! full-attention layers; all layers with the same window) form kinds; kinds are cut into groups
//! of the same number of layers, the greatest common divisor of the kinds' layer counts, so that
//! a page of any group has the same bytes and none is padded. Each sequence has one block table
//! a group. A page holds `block_tokens` positions of every layer in the group.

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    BF16,
    /// fp8 e4m3, one `f32` scale a token and head.
    F8E4M3,
    /// int8, one `f32` scale a token and head.
    Int8,
    /// int4, keys rotated by a Hadamard matrix, one `f16` scale and zero a token, head and 32 elements.
    Int4,
}

/// What one layer stores for one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvLayerShape {
    /// Keys and values of `kv_heads` heads.
    Heads {
        /// Heads.
        kv_heads: usize,
        /// Elements of a key.
        key_dim: usize,
        /// Elements of a value.
        value_dim: usize,
    },
    /// One latent and one rotary key (MLA).
    Latent {
        /// Elements of the latent.
        rank: usize,
        /// Elements of the rotary key.
        rope_dim: usize,
    },
}

/// Layers that share a block table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvGroup {
    /// Indexes into [`KvLayout::layers`].
    pub layers: Vec<u32>,
    /// The window of every layer here; `None` keeps all positions.
    pub window: Option<usize>,
}

/// A layer of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayerDecl {
    /// What it stores.
    pub shape: KvLayerShape,
    /// The group that it is in.
    pub group: u32,
    /// Its place within the group's pages.
    pub slot: u32,
}

/// The shape of the cache of one program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    /// Positions in a block.
    pub block_tokens: usize,
    /// All layers, indexed by [`crate::KvLayer`].
    pub layers: Vec<KvLayerDecl>,
    /// Layers that share a block table; a sequence has one table for each.
    pub groups: Vec<KvGroup>,
}
