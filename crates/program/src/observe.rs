//! `Observer`: sees what goes into each op, for calibration and statistics.

use crate::op::{Op, Value};

/// One input of an op.
#[derive(Debug, Clone, Copy)]
pub struct ObservedInput<'a> {
    /// Which value.
    pub value: Value,
    /// `[rows, width]`, in the order of the step's rows.
    pub data: &'a [f32],
    /// Elements in a row.
    pub width: usize,
}

/// The choice of a router, as an observer sees it.
#[derive(Debug, Clone, Copy)]
pub struct ObservedRouting<'a> {
    /// `[rows, experts_per_token]`, best first.
    pub experts: &'a [u32],
    /// As `experts`: the weights.
    pub weights: &'a [f32],
    /// Choices of a row.
    pub experts_per_token: usize,
}

/// The rows that reach one expert's matrices.
#[derive(Debug, Clone, Copy)]
pub struct ObservedExpert<'a> {
    /// The expert, by its place in the op's matrices.
    pub expert: usize,
    /// Rows of the step, ascending.
    pub rows: &'a [u32],
    /// `[rows, in]`: what `gate` and `up` read.
    pub input: &'a [f32],
    /// `[rows, hidden]`: what `down` reads.
    pub hidden: &'a [f32],
}

/// Called by an executor's [`crate::Executor::run_observed`], on the thread that called it, in
/// the order of the program's ops. Slices are valid during the call only.
pub trait Observer {
    /// Before op `index` runs: its inputs, in the order of [`Op::inputs`].
    fn op(&mut self, index: usize, op: &Op, inputs: &[ObservedInput<'_>]);

    /// After the router at op `index` chose.
    fn routing(&mut self, index: usize, op: &Op, routing: ObservedRouting<'_>) {
        let _ = (index, op, routing);
    }

    /// While the experts of op `index` run: once for each expert that has rows.
    fn expert(&mut self, index: usize, op: &Op, expert: ObservedExpert<'_>) {
        let _ = (index, op, expert);
    }
}
