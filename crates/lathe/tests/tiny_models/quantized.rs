//! A tiny Llama in the layouts of other projects (`tests/peers/quantized_fixtures.py`): the CPU
//! runs each, in whatever codes it has them, as the reference does.

use std::path::Path;
use std::sync::Arc;

use lathe_engine::score::Feed;
use lathe_model::Model;
use lathe_program::reference::ReferenceBackend;
use lathe_program::{Backend, Executor};

use crate::{executor, options, program};

const TOKENS: [u32; 12] = [3, 60, 17, 5, 5, 42, 9, 33, 21, 8, 1, 2];

#[test]
fn quantized_layouts_run_as_on_the_reference() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/quantized");
    let entries = std::fs::read_dir(root).expect("fixtures");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.is_dir());
    assert!(paths.len() >= 20, "{} folders", paths.len());
    for path in paths {
        let expected = logits(&path, None);
        // As the tiny models' own bounds: other additions, then activations of 12 to 16 bits and a
        // cache of 16. Where inputs are rounded to a few bits, a little error sends some to the
        // other side of a tie.
        let rounded = !Model::open(&path).expect("opens").spec.inputs.is_empty();
        let bounds = [(true, 2e-4), (false, 1e-2)];
        for (exact, bound) in bounds.into_iter().filter(|(exact, _)| *exact || !rounded) {
            let found = logits(&path, Some(exact));
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let off =
                off.fold(0.0, |most, off| if off.is_nan() { off } else { f32::max(most, off) });
            assert!(off <= bound, "{}: {off:.1e}, exact: {exact}", path.display());
        }
    }
}

/// Logits of all positions, on the reference, or on the CPU, exactly or not.
fn logits(path: &Path, exact: Option<bool>) -> Vec<f32> {
    let model = Model::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let program = program(&model, 4);
    let options = options(200, 64, exact.unwrap_or(true));
    let mut executor: Box<dyn Executor> = match exact {
        None => {
            let weights = model.weights(&program).expect("weights");
            let backend = ReferenceBackend::new();
            backend.prepare(Arc::clone(&program), &weights, &options).expect("prepares")
        }
        Some(_) => executor(&model, &program, &options),
    };
    let mut feed = Feed::new(&*executor, &TOKENS, 0).expect("fits");
    let mut logits = Vec::new();
    while feed.rows() > 0 {
        let rows = feed.rows();
        logits.extend_from_slice(feed.run(&mut *executor, rows).expect("runs").1);
    }
    logits
}
