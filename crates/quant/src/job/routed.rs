//! What a pass keeps of a mixture: the choices of its routers and the inputs of its experts.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lathe_program::{Op, Program, Value};

use super::reports::CoverageReport;

/// Counts choices.
pub(super) struct Coverage(Vec<CoverageReport>);

impl Coverage {
    /// Of the routers among ops `range`.
    pub(super) fn new(program: &Program, range: Range<usize>) -> Self {
        let one = |op: &Op| match op {
            Op::Route { spec, .. } => Some(CoverageReport {
                router: program.weight(spec.weight).name.clone(),
                tokens: vec![0; spec.experts],
            }),
            _ => None,
        };
        Coverage(program.ops[range].iter().filter_map(one).collect())
    }

    /// What each router chose for some rows.
    pub(super) fn add(&mut self, routings: &[Vec<u32>]) {
        for (report, chosen) in self.0.iter_mut().zip(routings) {
            chosen.iter().for_each(|expert| report.tokens[*expert as usize] += 1);
        }
    }

    pub(super) fn finish(self) -> Vec<CoverageReport> {
        self.0
    }
}

/// The inputs of experts that are quantized, all tokens.
#[derive(Default)]
pub(super) struct ExpertInputs {
    pub rows: BTreeMap<Value, Vec<f32>>,
    /// The float model's, where a technique asks how the two differ.
    pub floats: BTreeMap<Value, Vec<f32>>,
}

impl ExpertInputs {
    /// None yet, of the experts among `ops`.
    pub(super) fn new(program: &Program, ops: &BTreeSet<usize>) -> Self {
        let one = |op: &usize| match &program.ops[*op] {
            Op::Experts { input, .. } => Some((*input, Vec::new())),
            _ => None,
        };
        ExpertInputs { rows: ops.iter().filter_map(one).collect(), floats: BTreeMap::new() }
    }

    /// Adds rows of `value`, and the float model's if they are known.
    pub(super) fn add(&mut self, value: Value, rows: &[f32], floats: Option<&[f32]>) {
        let Some(all) = self.rows.get_mut(&value) else { return };
        all.extend_from_slice(rows);
        if let Some(floats) = floats {
            self.floats.entry(value).or_default().extend_from_slice(floats);
        }
    }
}
