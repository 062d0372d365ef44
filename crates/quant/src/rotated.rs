//! The matrices whose inputs a program rotates while it runs.

use lathe_program::{Op, Program, Weight};

/// The matrices of `program` whose inputs are rotated while it runs, with the elements of a rotated
/// block.
pub(crate) fn rotated(program: &Program) -> Vec<(Weight, usize)> {
    let mut found = Vec::new();
    let block_of = |value| {
        program.ops.iter().find_map(|op| match op {
            Op::Transform { transform, out, .. } if *out == value => transform.hadamard,
            _ => None,
        })
    };
    for op in &program.ops {
        match op {
            Op::Linear { input, parts } => {
                let block = block_of(*input);
                found.extend(parts.iter().filter_map(|part| Some((part.weight, block?))));
            }
            Op::Experts { input, spec, .. } => {
                let block = block_of(*input);
                found.extend([spec.gate, spec.up].into_iter().filter_map(|it| Some((it, block?))));
                found.extend(spec.hidden_transform.hadamard.map(|block| (spec.down, block)));
            }
            _ => {}
        }
    }
    found
}
