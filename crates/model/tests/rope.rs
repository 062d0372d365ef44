//! Rotary tables of every kind of scaling against transformers' (`tests/fixtures/make_rope.py`).

use lathe_model::DecoderSpec;
use lathe_model::lower::{LowerOptions, lower};
use serde_json::Value;

#[test]
fn tables_equal_the_reference() {
    let cases: Value =
        serde_json::from_str(include_str!("../../../tests/fixtures/rope.json")).unwrap();
    for case in cases.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let spec = DecoderSpec::from_hf_config(&case["config"])
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let context = case["context"].as_u64().unwrap() as usize;
        let program = lower(&spec, &LowerOptions::new(context)).unwrap();
        let table = &program.ropes[0];
        let expected = case["inverse_frequencies"].as_array().unwrap();
        // The reference was asked for a text of as many positions.
        let frequencies = table.frequencies(program.long_rope(context));
        assert_eq!(frequencies.len(), expected.len(), "{name}");
        for (pair, (found, expected)) in frequencies.iter().zip(expected).enumerate() {
            let expected = expected.as_f64().unwrap();
            let off = (*found as f64 - expected).abs();
            // A few units in the last place: powers are rounded differently by libraries.
            assert!(off <= 6e-7 * expected, "{name}: pair {pair}: {found} for {expected}");
        }
        let expected = case["magnitude"].as_f64().unwrap();
        assert!((table.magnitude as f64 - expected).abs() < 1e-6, "{name}: {}", table.magnitude);
    }
}
