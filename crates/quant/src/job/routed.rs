//! What a pass keeps of a mixture of experts: its routers' choices and its experts' inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lathe_program::{Op, Program, Value};

use super::reports::CoverageReport;

/// Counts routers' choices.
pub(super) struct Coverage(Vec<CoverageReport>);

impl Coverage {
    /// Empty counts for the routers among ops `range`.
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

    /// Adds the choices of each router for some rows.
    pub(super) fn add(&mut self, routings: &[Vec<u32>]) {
        for (report, chosen) in self.0.iter_mut().zip(routings) {
            chosen.iter().for_each(|expert| report.tokens[*expert as usize] += 1);
        }
    }

    pub(super) fn finish(self) -> Vec<CoverageReport> {
        self.0
    }
}

/// The inputs of the experts that are quantized, for all tokens.
#[derive(Default)]
pub(super) struct ExpertInputs {
    pub rows: BTreeMap<Value, Vec<f32>>,
    /// The float model's inputs, if a technique compares the two.
    pub floats: BTreeMap<Value, Vec<f32>>,
}

impl ExpertInputs {
    /// Empty, for the experts among `ops`.
    pub(super) fn new(program: &Program, ops: &BTreeSet<usize>) -> Self {
        let one = |op: &usize| match &program.ops[*op] {
            Op::Experts { input, .. } => Some((*input, Vec::new())),
            _ => None,
        };
        ExpertInputs { rows: ops.iter().filter_map(one).collect(), floats: BTreeMap::new() }
    }

    /// Adds rows of `value`, and the float model's if given.
    pub(super) fn add(&mut self, value: Value, rows: &[f32], floats: Option<&[f32]>) {
        let Some(all) = self.rows.get_mut(&value) else { return };
        all.extend_from_slice(rows);
        if let Some(floats) = floats {
            self.floats.entry(value).or_default().extend_from_slice(floats);
        }
    }
}
