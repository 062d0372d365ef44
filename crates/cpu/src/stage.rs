//! `Stage`: an op, or a few fused ones, with everything resolved that does not change from step
//! to step: buffers, packed weights, cache layers.

use lathe_program::{Activation, NormKind, RopeStyle};
use lathe_tensor::Tensor;

use crate::attend::AttendShape;
use crate::experts::{ExpertsStage, RouteStage};
use crate::latent::LatentStage;
use crate::linear::Matrix;
use crate::linear::Operands;
use crate::rows::Rows;
use crate::transform::TransformStage;

/// A norm's numbers.
#[derive(Debug)]
pub(crate) struct NormStage {
    /// `[rows, groups * n]`.
    pub input: Rows,
    /// `[n]` or `[groups * n]`.
    pub weight: Option<Vec<f32>>,
    /// As `weight`.
    pub bias: Option<Vec<f32>>,
    /// Which norm.
    pub kind: NormKind,
    /// Added under the root.
    pub epsilon: f32,
    /// Parts of a row.
    pub groups: usize,
    /// As `input`; unused where a norm is fused into what reads it.
    pub out: Rows,
}

/// A sum's numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AddStage {
    /// `[rows, n]`.
    pub left: Rows,
    /// `[rows, n]`.
    pub right: Rows,
    /// Multiplies `right`.
    pub scale: f32,
    /// `[rows, n]`.
    pub out: Rows,
}

/// A nonlinearity's numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ActivateStage {
    /// `[rows, n]`.
    pub gate: Rows,
    /// `[rows, n]`.
    pub up: Option<Rows>,
    /// Which.
    pub kind: Activation,
    /// `[rows, n]`; unused where fused into what reads it.
    pub out: Rows,
}

/// What a linear group reads.
#[derive(Debug)]
pub(crate) enum LinearInput {
    /// A buffer.
    Rows(Rows),
    /// A norm, made on the way.
    Norm(NormStage),
    /// A sum, stored, and its norm, made on the way.
    AddNorm(AddStage, NormStage),
    /// A nonlinearity, made on the way.
    Activate(ActivateStage),
}

/// What the logits' matrix reads.
#[derive(Debug)]
pub(crate) enum LogitsInput {
    /// A buffer.
    Rows(Rows),
    /// A norm, made on the way for the rows that are asked for.
    Norm(NormStage),
}

/// One matrix of a linear group.
#[derive(Debug)]
pub(crate) struct PartStage {
    /// `[out, in]`.
    pub matrix: Matrix,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
    /// How much of the product is added to what `out` holds; `None` replaces it.
    pub accumulate: Option<f32>,
    /// `[rows, out]`.
    pub out: Rows,
}

/// A linear group.
#[derive(Debug)]
pub(crate) struct LinearStage {
    /// What it reads.
    pub source: LinearInput,
    /// Elements of an input row.
    pub columns: usize,
    /// What the matrices need of their input.
    pub operands: Operands,
    /// The matrices.
    pub parts: Vec<PartStage>,
}

/// The logits.
#[derive(Debug)]
pub(crate) struct LogitsStage {
    /// What it reads.
    pub source: LogitsInput,
    /// `[vocabulary, width]`.
    pub matrix: Matrix,
    /// What the matrix needs of its input.
    pub operands: Operands,
    /// Multiplies the product.
    pub scale: f32,
    /// Applied after the scale.
    pub softcap: Option<f32>,
    /// Whether the matrix has this rank's tokens only, and the ranks' logits are put together.
    pub gather: bool,
}

/// A rotation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RotateStage {
    /// `[rows, heads * head_dim]`.
    pub input: Rows,
    /// Heads.
    pub heads: usize,
    /// First turned element of a head.
    pub offset: usize,
    /// Which elements pair up.
    pub style: RopeStyle,
    /// Which table.
    pub rope: usize,
    /// As `input`.
    pub out: Rows,
}

/// An attention over heads.
#[derive(Debug)]
pub(crate) struct AttendStage {
    /// The numbers.
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
        /// Token of the table's first row.
        first_token: u32,
        /// Multiplies the row.
        multiplier: f32,
        /// `[rows, width]`.
        out: Rows,
    },
    /// A value from outside.
    Input {
        /// Which of the step's inputs.
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
    /// Rows rotated and rounded.
    Transform(TransformStage),
    /// Keys and values, or latents and rotary keys, into the cache.
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
    /// A value for the caller.
    Capture {
        /// `[rows, n]`.
        input: Rows,
        /// Which tap.
        tap: usize,
    },
}

impl Stage {
    /// Whether it makes a difference to its products which rows are in the prefill form.
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
