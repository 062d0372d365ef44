//! Which form of latent attention a row gets: the rule of `LatentSpec::expanded_rows`.

use lathe_program::conformance::models::SmallDecoder;
use lathe_program::{LatentSpec, Weight};

fn spec(rank: usize, rope_dim: usize, nope_dim: usize, value_dim: usize) -> LatentSpec {
    LatentSpec {
        heads: 16,
        rank,
        rope_dim,
        nope_dim,
        value_dim,
        scale: 1.0,
        window: None,
        softcap: None,
        key_up: Weight(0),
        value_up: Weight(0),
    }
}

/// FLOPs of a head: absorbed, expanded.
fn flops(spec: &LatentSpec, rows: usize, seen: usize) -> [usize; 2] {
    let made = spec.nope_dim + spec.value_dim;
    [
        2 * rows * seen * (2 * spec.rank + spec.rope_dim) + 2 * rows * spec.rank * made,
        2 * rows * seen * (made + spec.rope_dim) + 2 * seen * spec.rank * made,
    ]
}

#[test]
fn whole_blocks_never_cost_more_expanded() {
    // DeepSeek-V2 and V3, MiniCPM3, mla-moe: 171, 86 and 128 rows, in whole tiles.
    for (spec, expected) in
        [(spec(512, 64, 128, 128), 192), (spec(256, 32, 64, 64), 128), (spec(128, 32, 64, 64), 128)]
    {
        let rows = spec.expanded_rows().unwrap();
        assert_eq!(rows, expected);
        for seen in [rows, 2 * rows, 1000, 100_000] {
            let [absorbed, expanded] = flops(&spec, rows, seen);
            assert!(expanded <= absorbed, "{rows} rows see {seen}: {expanded} and {absorbed}");
        }
        let [absorbed, expanded] = flops(&spec, 1, 1000);
        assert!(absorbed < expanded);
    }
    // Keys and values as large as two latents are never worth making.
    assert_eq!(spec(64, 32, 64, 64).expanded_rows(), None);
}

#[test]
fn the_form_depends_on_the_prompt_alone() {
    let program = SmallDecoder::latent().program();
    // Rank 64, 32 and 32: 64 rows.
    for (given, expanded) in [(1, 0), (63, 0), (64, 64), (127, 64), (128, 128), (530, 512)] {
        assert_eq!(program.expanded_until(given), expanded);
    }
    assert_eq!(SmallDecoder::grouped().program().expanded_until(1000), 0);
}
