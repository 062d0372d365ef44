//! The shape of the paged KV cache. The engine hands out its blocks, and the backends own its
//! memory.
//!
//! One pool of equal pages serves every kind of layer. Layers that keep the same positions form a
//! kind: all full-attention layers, or all layers with the same window. Each kind is cut into
//! groups of equally many layers. The size of a group is the greatest common divisor of the kinds'
//! layer counts, so that a page has the same bytes in every group, without padding. Each sequence
//! has one block table for each group. A page holds `block_tokens` positions of every layer in its
//! group.
//!
//! If layers store different amounts, two cases stay exact and one is padded:
//! - One kind only: a single group holds all layers, whatever their shapes.
//! - Several kinds of different shapes: a kind is also split by shape. Group sizes are divisors of
//!   each kind's layer count, chosen for the least padding and then for the fewest groups. For
//!   example, local layers of 256 elements beside global ones of 512 get twice as many layers in a
//!   page, and no padding. If no exact sizes exist, the smaller pages end in unused bytes
//!   ([`KvLayout::padding_bytes`]).

use crate::op::KvLayer;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    BF16,
    /// int16 with one `f32` scale for each token and head. It has four bits more precision than
    /// `f16`, and takes four bytes more for each vector.
    Int16,
    /// fp8 e4m3 with one `f32` scale for each token and head.
    F8E4M3,
    /// int8 with one `f32` scale for each token and head.
    Int8,
    /// int4. A Hadamard matrix rotates keys. Each token, head and 32 elements have one `f16` scale
    /// and zero.
    Int4,
}

impl KvFormat {
    /// Every format.
    pub const ALL: [KvFormat; 7] = [
        KvFormat::F32,
        KvFormat::F16,
        KvFormat::BF16,
        KvFormat::Int16,
        KvFormat::F8E4M3,
        KvFormat::Int8,
        KvFormat::Int4,
    ];

    /// The name on the command line: `f32`, `f16`, `bf16`, `int16`, `fp8`, `int8`, `int4`.
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::F32 => "f32",
            KvFormat::F16 => "f16",
            KvFormat::BF16 => "bf16",
            KvFormat::Int16 => "int16",
            KvFormat::F8E4M3 => "fp8",
            KvFormat::Int8 => "int8",
            KvFormat::Int4 => "int4",
        }
    }

    /// The format with that name. `fp8_e4m3` also means `fp8`.
    pub fn parse(name: &str) -> Option<KvFormat> {
        let name = if name == "fp8_e4m3" { "fp8" } else { name };
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Bytes of one stored vector (a head's key, a latent) of `elements`, with its scales.
    pub fn vector_bytes(self, elements: usize) -> usize {
        match self {
            KvFormat::F32 => 4 * elements,
            KvFormat::F16 | KvFormat::BF16 => 2 * elements,
            KvFormat::Int16 => 2 * elements + 4,
            KvFormat::F8E4M3 | KvFormat::Int8 => elements + 4,
            KvFormat::Int4 => elements.div_ceil(2) + 4 * elements.div_ceil(INT4_GROUP),
        }
    }
}

/// Elements that share a scale and a zero in [`KvFormat::Int4`].
pub const INT4_GROUP: usize = 32;

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

impl KvLayerShape {
    /// The vectors that are stored for a token, as `(count, elements)`. Each has its own scales.
    pub fn vectors(self) -> [(usize, usize); 2] {
        match self {
            KvLayerShape::Heads { kv_heads, key_dim, value_dim } => {
                [(kv_heads, key_dim), (kv_heads, value_dim)]
            }
            KvLayerShape::Latent { rank, rope_dim } => [(1, rank), (1, rope_dim)],
        }
    }

    /// Numbers stored for a token.
    pub fn elements_per_token(self) -> usize {
        self.vectors().iter().map(|(count, elements)| count * elements).sum()
    }

    /// Bytes stored for a token, scales included.
    pub fn bytes_per_token(self, format: KvFormat) -> usize {
        let vectors = self.vectors();
        vectors.iter().map(|(count, elements)| count * format.vector_bytes(*elements)).sum()
    }
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
    /// The shape of its entries.
    pub shape: KvLayerShape,
    /// Its group.
    pub group: u32,
    /// Its place in the group's pages.
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

impl KvLayout {
    /// The layout of `layers`, each with its shape and its window, in blocks of `block_tokens`
    /// positions. Groups are ordered by their kind's first layer.
    ///
    /// # Panics
    /// If `block_tokens` is 0.
    pub fn new(layers: &[(KvLayerShape, Option<usize>)], block_tokens: usize) -> KvLayout {
        assert!(block_tokens > 0, "a block holds at least one token");
        let one_window = layers.windows(2).all(|pair| pair[0].1 == pair[1].1);
        let kinds = if one_window && !layers.is_empty() {
            vec![(0..layers.len() as u32).collect()]
        } else {
            kinds_by_window_and_shape(layers)
        };
        let sizes = if kinds.len() == 1 { vec![layers.len()] } else { group_sizes(layers, &kinds) };
        let unplaced = KvLayerDecl {
            shape: KvLayerShape::Latent { rank: 0, rope_dim: 0 },
            group: u32::MAX,
            slot: 0,
        };
        let mut layout =
            KvLayout { block_tokens, layers: vec![unplaced; layers.len()], groups: Vec::new() };
        for (kind, size) in kinds.iter().zip(sizes) {
            for chunk in kind.chunks(size) {
                for (slot, layer) in chunk.iter().enumerate() {
                    layout.layers[*layer as usize] = KvLayerDecl {
                        shape: layers[*layer as usize].0,
                        group: layout.groups.len() as u32,
                        slot: slot as u32,
                    };
                }
                let window = layers[chunk[0] as usize].1;
                layout.groups.push(KvGroup { layers: chunk.to_vec(), window });
            }
        }
        layout
    }

    /// The declaration of `layer`.
    pub fn layer(&self, layer: KvLayer) -> &KvLayerDecl {
        &self.layers[layer.0 as usize]
    }

    /// The group of `layer`, which has its block table.
    pub fn group_of(&self, layer: KvLayer) -> &KvGroup {
        &self.groups[self.layer(layer).group as usize]
    }

    /// Bytes of a page, the same for every group.
    pub fn page_bytes(&self, format: KvFormat) -> usize {
        let groups = 0..self.groups.len();
        groups.map(|group| self.group_bytes(group, format)).max().unwrap_or(0)
    }

    /// Unused bytes at the end of each page of `group`; 0 if all kinds divide evenly.
    pub fn padding_bytes(&self, group: usize, format: KvFormat) -> usize {
        self.page_bytes(format) - self.group_bytes(group, format)
    }

    /// Bytes that all layers store for one token, without padding.
    pub fn bytes_per_token(&self, format: KvFormat) -> usize {
        self.layers.iter().map(|layer| layer.shape.bytes_per_token(format)).sum()
    }

    /// The start of `layer`'s part of a page, in bytes from the page's start.
    pub fn slot_offset(&self, layer: KvLayer, format: KvFormat) -> usize {
        let decl = self.layer(layer);
        let before = &self.group_of(layer).layers[..decl.slot as usize];
        before.iter().map(|earlier| self.slot_bytes(KvLayer(*earlier), format)).sum()
    }

    /// Bytes of `layer`'s part of a page: `block_tokens` positions.
    pub fn slot_bytes(&self, layer: KvLayer, format: KvFormat) -> usize {
        self.block_tokens * self.layer(layer).shape.bytes_per_token(format)
    }

    /// The first position that a row at position `position` can still see in `group`.
    pub fn first_visible(&self, group: usize, position: usize) -> usize {
        match self.groups[group].window {
            Some(window) => (position + 1).saturating_sub(window),
            None => 0,
        }
    }

    /// Blocks that a sequence holds in `group` while it runs a step of `rows` rows after `cached`
    /// tokens. Blocks outside the window were released.
    pub fn blocks_held(&self, group: usize, cached: usize, rows: usize) -> usize {
        let first = self.first_visible(group, cached) / self.block_tokens;
        (cached + rows).div_ceil(self.block_tokens).saturating_sub(first)
    }

    /// Pages that a sequence needs to reach `tokens` positions, alone and row by row. A windowed
    /// group needs no more than the blocks that a window can touch at any position.
    pub fn pages_for(&self, tokens: usize) -> usize {
        let all = tokens.div_ceil(self.block_tokens);
        let group = |group: &KvGroup| match group.window {
            Some(window) => all.min((window.max(1) - 1).div_ceil(self.block_tokens) + 1),
            None => all,
        };
        self.groups.iter().map(group).sum()
    }

    /// Bytes of [`Self::pages_for`].
    pub fn bytes_for(&self, tokens: usize, format: KvFormat) -> usize {
        self.pages_for(tokens).saturating_mul(self.page_bytes(format))
    }

    fn group_bytes(&self, group: usize, format: KvFormat) -> usize {
        let layers = self.groups[group].layers.iter();
        layers.map(|layer| self.slot_bytes(KvLayer(*layer), format)).sum()
    }
}

/// Layers of equal window and shape, in order of their first layer.
fn kinds_by_window_and_shape(layers: &[(KvLayerShape, Option<usize>)]) -> Vec<Vec<u32>> {
    let mut kinds: Vec<Vec<u32>> = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        match kinds.iter_mut().find(|kind| layers[kind[0] as usize] == *layer) {
            Some(kind) => kind.push(index as u32),
            None => kinds.push(vec![index as u32]),
        }
    }
    kinds
}

/// The layers of a group, for each kind: divisors of the kinds' layer counts with the least
/// padding, then the fewest groups. For equal layers this is the greatest common divisor. Each
/// candidate is a page size that fits some kind exactly. Every other kind takes its largest divisor
/// that fits.
fn group_sizes(layers: &[(KvLayerShape, Option<usize>)], kinds: &[Vec<u32>]) -> Vec<usize> {
    let elements = |kind: &Vec<u32>| layers[kind[0] as usize].0.elements_per_token().max(1);
    let mut best: Option<(f64, usize, Vec<usize>)> = None;
    for page in kinds.iter().flat_map(|kind| divisors(kind.len()).map(|d| d * elements(kind))) {
        let fitting =
            |kind: &Vec<u32>| divisors(kind.len()).filter(|d| d * elements(kind) <= page).max();
        let Some(sizes) = kinds.iter().map(fitting).collect::<Option<Vec<usize>>>() else {
            continue;
        };
        let groups: usize = kinds.iter().zip(&sizes).map(|(kind, size)| kind.len() / size).sum();
        let used: usize = kinds.iter().map(|kind| kind.len() * elements(kind)).sum();
        let padding = 1.0 - used as f64 / (groups * page) as f64;
        let better =
            |(least, fewest, _): &(f64, usize, Vec<usize>)| (padding, groups) < (*least, *fewest);
        if best.as_ref().is_none_or(better) {
            best = Some((padding, groups, sizes));
        }
    }
    best.map(|(_, _, sizes)| sizes).unwrap_or_default()
}

fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |d| n.is_multiple_of(*d))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEMMA: KvLayerShape = KvLayerShape::Heads { kv_heads: 8, key_dim: 256, value_dim: 256 };

    #[test]
    fn one_kind_is_one_group() {
        let layout = KvLayout::new(&[(GEMMA, None); 5], 16);
        assert_eq!(layout.groups.len(), 1);
        assert_eq!(layout.bytes_per_token(KvFormat::BF16), 5 * 2 * 8 * 256 * 2);
        assert_eq!(layout.page_bytes(KvFormat::BF16), 16 * layout.bytes_per_token(KvFormat::BF16));
        assert_eq!(layout.slot_offset(KvLayer(2), KvFormat::F16), 2 * 16 * 2 * 8 * 256 * 2);
    }

    #[test]
    fn gemma3_12b_has_groups_of_eight_and_no_padding() {
        let layers: Vec<_> =
            (0..48).map(|i| (GEMMA, if i % 6 == 5 { None } else { Some(1024) })).collect();
        let layout = KvLayout::new(&layers, 16);
        assert_eq!(layout.groups.len(), 6);
        assert!(layout.groups.iter().all(|group| group.layers.len() == 8));
        assert!((0..6).all(|group| layout.padding_bytes(group, KvFormat::Int8) == 0));
        // 32k tokens: 5 windowed groups of 65 blocks, which 1024 positions can touch, and one full
        // group of 2048.
        assert_eq!(layout.pages_for(32768), 5 * 65 + 2048);
        for (index, layer) in layout.layers.iter().enumerate() {
            let group = &layout.groups[layer.group as usize];
            assert_eq!(group.layers[layer.slot as usize] as usize, index);
        }
    }

    #[test]
    fn wider_global_layers_fit_by_fewer_layers_a_page() {
        let wide = KvLayerShape::Heads { kv_heads: 8, key_dim: 512, value_dim: 512 };
        let layers: Vec<_> =
            (0..12).map(|i| if i % 6 == 5 { (wide, None) } else { (GEMMA, Some(64)) }).collect();
        let layout = KvLayout::new(&layers, 4);
        let groups = 0..layout.groups.len();
        assert!(groups.clone().all(|group| layout.padding_bytes(group, KvFormat::F16) == 0));
        assert_eq!(layout.groups.len(), 7);
    }

    #[test]
    fn one_window_of_mixed_shapes_is_one_group_without_padding() {
        let latent = KvLayerShape::Latent { rank: 512, rope_dim: 64 };
        let layout = KvLayout::new(&[(GEMMA, None), (latent, None), (latent, None)], 16);
        assert_eq!(layout.groups.len(), 1);
        assert_eq!(layout.padding_bytes(0, KvFormat::Int4), 0);
        assert_eq!(latent.bytes_per_token(KvFormat::BF16), 1152);
        assert_eq!(latent.bytes_per_token(KvFormat::Int8), 584);
        assert_eq!(latent.bytes_per_token(KvFormat::Int4), 288 + 4 * 18);
    }

    #[test]
    fn awkward_shapes_are_padded_and_say_so() {
        let odd = KvLayerShape::Heads { kv_heads: 3, key_dim: 10, value_dim: 10 };
        let layout = KvLayout::new(&[(GEMMA, None), (odd, Some(8))], 2);
        assert_eq!(layout.groups.len(), 2);
        assert!(layout.padding_bytes(1, KvFormat::F32) > 0);
        assert_eq!(layout.padding_bytes(0, KvFormat::F32), 0);
    }

    #[test]
    fn names_round_trip() {
        for format in KvFormat::ALL {
            assert_eq!(KvFormat::parse(format.name()), Some(format));
        }
        assert_eq!(KvFormat::parse("q4"), None);
    }
}
