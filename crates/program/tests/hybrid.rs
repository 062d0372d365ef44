//! What hybrid models take of the cache, next to what vLLM's hybrid KV cache manager would take for
//! them: the numbers of docs/attention-and-cache.md.
//!
//! vLLM's rule, from its `vllm/v1/core/kv_cache_utils.py` (late 2025): layers of equal kind are a
//! bucket; the group size is the smallest bucket's, or the largest's if that is less than 1.5 times
//! (before: 1.25 times) as large; each bucket is cut into groups of that size and the last one is
//! padded; a block of any group has the bytes of a full group.

use lathe_program::{KvFormat, KvLayerShape, KvLayout};

const BLOCK_TOKENS: usize = 16;
const CONTEXT: usize = 32768;

/// A model's layers: how many have a window, of what size, how many see everything.
struct Hybrid {
    name: &'static str,
    windowed: usize,
    window: usize,
    full: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// Shapes of the public configurations.
const MODELS: [Hybrid; 4] = [
    Hybrid { name: "Gemma-3-12B", windowed: 40, window: 1024, full: 8, kv_heads: 8, head_dim: 256 },
    Hybrid { name: "gpt-oss-20b", windowed: 12, window: 128, full: 12, kv_heads: 8, head_dim: 64 },
    Hybrid { name: "Gemma-3-4B", windowed: 29, window: 1024, full: 5, kv_heads: 4, head_dim: 256 },
    Hybrid {
        name: "Gemma-3-27B",
        windowed: 52,
        window: 1024,
        full: 10,
        kv_heads: 16,
        head_dim: 128,
    },
];

/// Groups, layers a group with padding, and bytes of one sequence at a context.
#[derive(Debug, PartialEq)]
struct Taken {
    groups: usize,
    layers: usize,
    bytes: usize,
}

impl Hybrid {
    fn layer_token_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_dim * 2
    }

    /// Blocks that a window of the last `window` positions can touch, and all of a full layer's.
    fn blocks(&self) -> (usize, usize) {
        ((self.window - 1).div_ceil(BLOCK_TOKENS) + 1, CONTEXT.div_ceil(BLOCK_TOKENS))
    }

    fn lathe(&self) -> Taken {
        let shape = KvLayerShape::Heads {
            kv_heads: self.kv_heads,
            key_dim: self.head_dim,
            value_dim: self.head_dim,
        };
        let windowed = vec![(shape, Some(self.window)); self.windowed];
        let layers = [windowed, vec![(shape, None); self.full]].concat();
        let layout = KvLayout::new(&layers, BLOCK_TOKENS);
        let padding = |group| layout.padding_bytes(group, KvFormat::BF16);
        assert_eq!((0..layout.groups.len()).map(padding).sum::<usize>(), 0, "{}", self.name);
        Taken {
            groups: layout.groups.len(),
            layers: layout.groups[0].layers.len(),
            bytes: layout.bytes_for(CONTEXT, KvFormat::BF16),
        }
    }

    fn vllm(&self) -> Taken {
        let (least, most) = (self.windowed.min(self.full), self.windowed.max(self.full));
        let size = if 2 * most < 3 * least { most } else { least };
        let (windowed, full) = (self.windowed.div_ceil(size), self.full.div_ceil(size));
        let (window_blocks, full_blocks) = self.blocks();
        let blocks = windowed * window_blocks + full * full_blocks;
        let block_bytes = size * BLOCK_TOKENS * self.layer_token_bytes();
        Taken { groups: windowed + full, layers: size, bytes: blocks * block_bytes }
    }

    /// Every layer keeping every position, as without a hybrid manager.
    fn uniform(&self) -> usize {
        (self.windowed + self.full) * CONTEXT * self.layer_token_bytes()
    }

    /// Nothing but positions that some later row sees, without blocks.
    fn ideal(&self) -> usize {
        (self.windowed * self.window + self.full * CONTEXT) * self.layer_token_bytes()
    }
}

#[test]
fn hybrid_models_take_no_more_than_in_vllm() {
    for model in &MODELS {
        let (ours, theirs) = (model.lathe(), model.vllm());
        println!(
            "{}: lathe {ours:?}, vllm {theirs:?}, uniform {}, ideal {}",
            model.name,
            model.uniform(),
            model.ideal()
        );
        assert!(ours.bytes <= theirs.bytes && ours.bytes >= model.ideal());
    }
    let taken = |index: usize| (MODELS[index].lathe(), MODELS[index].vllm());
    // The same groups where one kind's layers are a multiple of the other's.
    let gemma = Taken { groups: 6, layers: 8, bytes: (5 * 65 + 2048) * 8 * 16 * 8192 };
    assert_eq!(taken(0).0, gemma);
    assert_eq!(taken(0).1, gemma);
    let gpt_oss = Taken { groups: 2, layers: 12, bytes: (9 + 2048) * 12 * 16 * 2048 };
    assert_eq!(taken(1).0, gpt_oss);
    assert_eq!(taken(1).1, gpt_oss);
    // Padding where it is not.
    let (ours, theirs) = taken(3);
    assert_eq!((ours.groups, ours.layers, theirs.groups, theirs.layers), (31, 2, 7, 10));
    assert_eq!(theirs.bytes - ours.bytes, (6 * 10 - 52) * 65 * 16 * 8192);
}
