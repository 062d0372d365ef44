//! [`lathe_program::Op::Experts`] as a grouped product. Rows are sorted by expert, and each chosen
//! expert reads its matrices once for all of its rows.
//!
//! Invariant: a row's experts are added in the order of their numbers. So its sum does not depend
//! on the rows beside it.

use std::ops::Range;

use lathe_program::ExpertsSpec;

use super::route::ChosenExperts;
use crate::elementwise::Activate;
use crate::gang::Gang;
use crate::lanes::{Kernel, LANES, Lanes, Width, dispatch};
use crate::linear::Matrix;
use crate::linear::{Activations, Operands, Part, matmul};
use crate::rows::Rows;
use crate::transform::Transform;

/// Experts, ready to run.
#[derive(Debug)]
pub(crate) struct ExpertsStage {
    /// `[rows, in]`.
    pub input: Rows,
    /// The program's number of the routing that says which rows each expert gets.
    pub routing: usize,
    /// The spec of the experts.
    pub spec: ExpertsSpec,
    /// The transform of the input of `down`.
    pub hidden_transform: Option<Transform>,
    /// `[hidden, in]` each.
    pub gate: Vec<Matrix>,
    /// `[hidden, in]` each.
    pub up: Vec<Matrix>,
    /// `[out, hidden]` each.
    pub down: Vec<Matrix>,
    /// `[experts, hidden]`.
    pub gate_bias: Option<Vec<f32>>,
    /// `[experts, hidden]`.
    pub up_bias: Option<Vec<f32>>,
    /// `[experts, out]`.
    pub down_bias: Option<Vec<f32>>,
    /// The forms of the input that gate and up need.
    pub operands: Operands,
    /// The forms of the input that down needs.
    pub down_operands: Operands,
    /// `[rows, out]`.
    pub out: Rows,
}

/// Memory for grouping rows, kept from step to step.
#[derive(Debug, Default)]
pub(crate) struct GroupScratch {
    /// The start of each expert's pairs, and the end of the last.
    starts: Vec<u32>,
    /// Pairs of a row and a place among its experts, sorted by expert: `row * per_row + place`.
    pairs: Vec<u32>,
    /// `[rows_max, hidden]`.
    pub gate: Vec<f32>,
    /// `[rows_max, hidden]`.
    pub up: Vec<f32>,
    /// `[rows_max, out]`.
    pub down: Vec<f32>,
}

impl GroupScratch {
    /// Grows to the memory that `stage` needs for `rows` rows.
    pub(crate) fn reserve(&mut self, stage: &ExpertsStage, rows: usize, per_row: usize) {
        let grow = |v: &mut Vec<f32>, n: usize| v.resize(v.len().max(n), 0.0);
        grow(&mut self.gate, rows * stage.spec.hidden);
        grow(&mut self.up, rows * stage.spec.hidden);
        grow(&mut self.down, rows * stage.out.width());
        self.starts.reserve(stage.spec.experts + 1);
        self.pairs.reserve(rows * per_row);
    }

    /// Sorts the pairs of `rows` rows by expert and keeps the order of rows.
    fn sort(&mut self, routing: &ChosenExperts, rows: usize, spec: &ExpertsSpec) {
        let experts = &routing.experts[..rows * routing.per_row];
        let local = |expert: u32| {
            (expert as usize).checked_sub(spec.first_expert).filter(|e| *e < spec.experts)
        };
        self.starts.clear();
        self.starts.resize(spec.experts + 1, 0);
        experts.iter().filter_map(|e| local(*e)).for_each(|e| self.starts[e + 1] += 1);
        for e in 0..spec.experts {
            self.starts[e + 1] += self.starts[e];
        }
        self.pairs.clear();
        self.pairs.resize(self.starts[spec.experts] as usize, 0);
        for (pair, expert) in experts.iter().enumerate() {
            if let Some(e) = local(*expert) {
                self.pairs[self.starts[e] as usize] = pair as u32;
                self.starts[e] += 1;
            }
        }
        // Filling the pairs moved each start to the end of its group.
        self.starts.rotate_right(1);
        self.starts[0] = 0;
    }
}

impl ExpertsStage {
    /// Runs every chosen expert on its rows. `prefill` says which rows are in the prefill form.
    ///
    /// # Safety
    /// Input and output are valid for `rows` rows and overlap nothing that others touch.
    pub(crate) unsafe fn run(
        &self,
        (width, gang): (Width, &Gang),
        prefill: &[bool],
        routing: &ChosenExperts,
        (activations, scratch): (&mut Activations, &mut GroupScratch),
    ) {
        let rows = prefill.len();
        scratch.sort(routing, rows, &self.spec);
        // SAFETY: the caller vouches for the rows.
        unsafe { self.out.slices_mut(rows) }.fill(0.0);
        for expert in 0..self.spec.experts {
            let range = scratch.starts[expert] as usize..scratch.starts[expert + 1] as usize;
            if !range.is_empty() {
                let pairs = scratch.pairs[range.clone()].iter();
                let row_of = |pair: &u32| *pair as usize / routing.per_row;
                activations.set_forms(pairs.map(|pair| prefill[row_of(pair)]));
                // SAFETY: as above.
                unsafe {
                    self.run_one((width, gang), expert, range, routing, activations, scratch)
                };
            }
        }
        activations.set_forms(prefill.iter().copied());
    }

    unsafe fn run_one(
        &self,
        (width, gang): (Width, &Gang),
        expert: usize,
        range: Range<usize>,
        routing: &ChosenExperts,
        activations: &mut Activations,
        scratch: &mut GroupScratch,
    ) {
        let (hidden, columns) = (self.spec.hidden, self.input.width());
        let count = range.len();
        let pairs = &scratch.pairs[range];
        let row_of = |i: usize| pairs[i] as usize / routing.per_row;
        let weight_of = |i: usize| routing.weights[pairs[i] as usize];
        activations.prepare_with(gang, self.operands, (count, columns), |i, out| {
            // SAFETY: the input's rows are valid and nobody writes them now.
            out.copy_from_slice(unsafe { self.input.slice(row_of(i)) });
            if self.spec.weigh_input {
                out.iter_mut().for_each(|x| *x *= weight_of(i));
            }
        });
        let gate = &mut scratch.gate[..count * hidden];
        let up = &mut scratch.up[..count * hidden];
        let mut parts = [
            Part {
                bias: part_of(&self.gate_bias, expert, hidden),
                ..Part::new(&self.gate[expert], gate)
            },
            Part {
                bias: part_of(&self.up_bias, expert, hidden),
                ..Part::new(&self.up[expert], up)
            },
        ];
        matmul(gang, &mut parts, activations);
        let (gate, up) = (Rows::new(gate.as_mut_ptr(), hidden), Rows::new(up.as_mut_ptr(), hidden));
        activations.prepare_with(gang, self.down_operands, (count, hidden), |i, out| {
            let row = Rows::new(out.as_mut_ptr().wrapping_sub(i * hidden), hidden);
            let (kind, columns) = (self.spec.activation, 0..hidden);
            let (rows, up) = (i..i + 1, Some(up));
            dispatch(width, Activate { gate, up, kind, out: row, rows, columns });
            if let Some(transform) = &self.hidden_transform {
                transform.row(width, out);
            }
        });
        let columns = self.out.width();
        let down = &mut scratch.down[..count * columns];
        let mut parts = [Part {
            bias: part_of(&self.down_bias, expert, columns),
            ..Part::new(&self.down[expert], down)
        }];
        matmul(gang, &mut parts, activations);
        for i in 0..count {
            let weight = if self.spec.weigh_input { 1.0 } else { weight_of(i) };
            let to = self.out.row(row_of(i));
            dispatch(
                width,
                AddWeighted { from: &down[i * columns..(i + 1) * columns], weight, to },
            );
        }
    }
}

/// The part of a stacked bias that belongs to `expert`.
fn part_of(bias: &Option<Vec<f32>>, expert: usize, n: usize) -> Option<&[f32]> {
    bias.as_ref().map(|bias| &bias[expert * n..(expert + 1) * n])
}

/// `to += from * weight`.
struct AddWeighted<'a> {
    from: &'a [f32],
    weight: f32,
    /// As many floats as `from`. Nobody else touches them.
    to: *mut f32,
}

impl Kernel for AddWeighted<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.from.len();
        for i in (0..n).step_by(LANES) {
            // SAFETY: both have `n` floats.
            unsafe {
                let old = L::load_first(self.to.add(i), n - i);
                let new = L::load_first(self.from.as_ptr().add(i), n - i);
                new.fma(L::splat(self.weight), old).store_first(self.to.add(i), n - i);
            }
        }
    }
}
