//! `Stage`: an op, or a few fused ops, with all that does not change from step to step: buffers,
//! packed weights, cache layers.

use lathe_program::{Activation, NormKind, RopeStyle};
use lathe_tensor::Tensor;

use crate::attend::AttendShape;
use crate::experts::{ExpertsStage, RouteStage};
use crate::latent::LatentStage;
use crate::linear::Matrix;
use crate::linear::Operands;
use crate::rows::Rows;
use crate::transform::TransformStage;

/// The operands of a norm.
#[derive(Debug)]
pub(crate) struct NormStage {
    /// `[rows, groups * n]`.
    pub input: Rows,
    /// `[n]` or `[groups * n]`.
    pub weight: Option<Vec<f32>>,
    /// As `weight`.
    pub bias: Option<Vec<f32>>,
    /// The kind of norm.
    pub kind: NormKind,
    /// Is added under the root.
    pub epsilon: f32,
    /// Parts of a row that are normalised separately.
    pub groups: usize,
    /// As `input`. Unused where the norm is fused into what reads it.
    pub out: Rows,
}

/// The operands of a sum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AddStage {
    /// `[rows, n]`.
    pub left: Rows,
    /// `[rows, n]`.
    pub right: Rows,
    /// The factor of `right`.
    pub scale: f32,
    /// `[rows, n]`.
    pub out: Rows,
}

/// The operands of a nonlinearity.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ActivateStage {
    /// `[rows, n]`.
    pub gate: Rows,
    /// `[rows, n]`.
    pub up: Option<Rows>,
    /// The kind of nonlinearity.
    pub kind: Activation,
    /// `[rows, n]`. Unused where the nonlinearity is fused into what reads it.
    pub out: Rows,
}

/// The input of a linear group.
#[derive(Debug)]
pub(crate) enum LinearInput {
    /// A buffer.
    Rows(Rows),
    /// A norm, which is computed while its rows are prepared.
    Norm(NormStage),
    /// A sum, which is stored, and its norm. Both are computed while the rows are prepared.
    AddNorm(AddStage, NormStage),
    /// A nonlinearity, which is computed while its rows are prepared.
    Activate(ActivateStage),
}

/// The input of the logits' matrix.
#[derive(Debug)]
pub(crate) enum LogitsInput {
    /// A buffer.
    Rows(Rows),
    /// A norm, which is computed for the rows that are asked for.
    Norm(NormStage),
}

/// One matrix of a linear group.
#[derive(Debug)]
pub(crate) struct PartStage {
    /// `[out, in]`.
    pub matrix: Matrix,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
    /// The factor of the product that is added to `out`. `None`: the product replaces `out`.
    pub accumulate: Option<f32>,
    /// `[rows, out]`.
    pub out: Rows,
}

/// A linear group.
#[derive(Debug)]
pub(crate) struct LinearStage {
    /// The input.
    pub source: LinearInput,
    /// Elements of an input row.
    pub columns: usize,
    /// The forms of the input that the matrices need.
    pub operands: Operands,
    /// The matrices.
    pub parts: Vec<PartStage>,
}

/// The logits.
#[derive(Debug)]
pub(crate) struct LogitsStage {
    /// The input.
    pub source: LogitsInput,
    /// `[vocabulary, width]`.
    pub matrix: Matrix,
    /// The forms of the input that the matrix needs.
    pub operands: Operands,
    /// The factor of the product.
    pub scale: f32,
    /// `softcap * tanh(logit / softcap)`, applied after the scale.
    pub softcap: Option<f32>,
    /// Whether the matrix has only this rank's tokens. The logits of all ranks are then gathered.
    pub gather: bool,
}

/// A rotation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RotateStage {
    /// `[rows, heads * head_dim]`.
    pub input: Rows,
    /// Heads.
    pub heads: usize,
    /// The first element of a head that is rotated.
    pub offset: usize,
    /// Which elements form pairs.
    pub style: RopeStyle,
    /// The number of the rotary table.
    pub rope: usize,
    /// As `input`.
    pub out: Rows,
}

/// An attention over heads.
#[derive(Debug)]
pub(crate) struct AttendStage {
    /// The shape.
    pub shape: AttendShape,
    /// The layer of the cache.
    pub layer: usize,
    /// `[heads]`.
    pub sinks: Option<Vec<f32>>,
    /// `[rows, heads * key_dim]`.
    pub query: Rows,
    /// `[rows, heads * value_dim]`.
    pub out: Rows,
}

/// One entry of an executor's plan.
#[derive(Debug)]
pub(crate) enum Stage {
    /// Rows of the embedding.
    Embed {
        /// `[vocabulary, width]`.
        table: Tensor,
        /// The token of the table's first row.
        first_token: u32,
        /// The factor of the row.
        multiplier: f32,
        /// `[rows, width]`.
        out: Rows,
    },
    /// A value from outside.
    Input {
        /// The number of the step's input.
        input: usize,
        /// `[rows, n]`.
        out: Rows,
    },
    /// A norm.
    Norm(NormStage),
    /// A linear group with what precedes and follows it.
    Linear(LinearStage),
    /// A rotation.
    Rotate(RotateStage),
    /// Rotates and rounds rows.
    Transform(TransformStage),
    /// Writes keys and values, or latents and rotary keys, to the cache.
    Write {
        /// The layer of the cache.
        layer: usize,
        /// Keys or latents.
        first: Rows,
        /// Values or rotary keys.
        second: Rows,
    },
    /// Attention over heads.
    Attend(AttendStage),
    /// Attention over latents.
    AttendLatent(Box<LatentStage>),
    /// A nonlinearity.
    Activate(ActivateStage),
    /// A sum.
    Add(AddStage),
    /// A sigmoid gate.
    Gate {
        /// `[rows, n]`.
        input: Rows,
        /// `[rows, m]`.
        gate: Rows,
        /// `[rows, n]`.
        out: Rows,
    },
    /// Columns from `start` on.
    Copy {
        /// `[rows, n]`.
        input: Rows,
        /// First column.
        start: usize,
        /// `[rows, m]`.
        out: Rows,
    },
    /// The sum over all ranks.
    AllReduce {
        /// `[rows, n]`.
        input: Rows,
        /// `[rows, n]`.
        out: Rows,
    },
    /// The columns of all ranks.
    AllGather {
        /// `[rows, n]`.
        input: Rows,
        /// `[rows, n * ranks]`.
        out: Rows,
    },
    /// A router.
    Route(Box<RouteStage>),
    /// Experts.
    Experts(Box<ExpertsStage>),
    /// Logits.
    Logits(LogitsStage),
    /// A value that is handed to the caller.
    Capture {
        /// `[rows, n]`.
        input: Rows,
        /// The number of the tap.
        tap: usize,
    },
}

impl Stage {
    /// Whether rows in the prefill form are computed differently from the others.
    pub(crate) fn has_prefill_form(&self) -> bool {
        match self {
            Stage::Linear(linear) => linear.operands.has_prefill_form(),
            Stage::Logits(logits) => logits.operands.has_prefill_form(),
            Stage::Experts(experts) => {
                experts.operands.has_prefill_form() || experts.down_operands.has_prefill_form()
            }
            _ => false,
        }
    }

    /// The name of its kind, for profiles.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Stage::Embed { .. } => "embed",
            Stage::Input { .. } => "input",
            Stage::Norm(_) => "norm",
            Stage::Linear(_) => "linear",
            Stage::Rotate(_) => "rotate",
            Stage::Transform(_) => "transform",
            Stage::Write { .. } => "write",
            Stage::Attend(_) => "attend",
            Stage::AttendLatent(_) => "attend_latent",
            Stage::Activate(_) => "activate",
            Stage::Add(_) => "add",
            Stage::Gate { .. } => "gate",
            Stage::Copy { .. } => "copy",
            Stage::AllReduce { .. } => "all_reduce",
            Stage::AllGather { .. } => "all_gather",
            Stage::Route(_) => "route",
            Stage::Experts(_) => "experts",
            Stage::Logits(_) => "logits",
            Stage::Capture { .. } => "capture",
        }
    }
}
