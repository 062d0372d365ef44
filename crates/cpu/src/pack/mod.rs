//! `PackedMatrix`: a weight as the kernels stream it.
//!
//! Output rows are grouped in panels of sixteen, one lane of a vector each, and a panel is one
//! run of memory along k: a kernel reads it once, front to back. Every output element therefore
//! accumulates over k in its own lane in one fixed order, whether one row of activations or a
//! thousand pass by (batch invariance). The packed form has the bytes of the file's (plus the
//! padding of the last panel): decoding is bound by reading them.
//!
//! ```text
//! panel   = chunk 0, chunk 1, ...            a chunk is 16 rows x (16, 32 or 256) of k
//! f32,f16 : k: 16 lanes
//! bf16    : two k: 16 lanes x (k, k+1), the operand of a bf16 dot or of an AMX tile
//! coded   : codes of 32 k: 4 (or 8) x 64 bytes, then their further bit planes, then scales.
//!           A 64-byte vector is 16 lanes x 4 neighbours in k, the operand of an int8 dot or tile:
//!           vector s holds k 8s..8s+4 in the low nibbles and 8s+4..8s+8 in the high ones.
//! ```
//! [`coded`] has the details for each format.

pub(crate) mod coded;
pub(crate) mod memory;

use std::ops::Range;
use std::sync::Arc;

use lathe_program::BackendError;
use lathe_tensor::{FloatType, Format, GgmlType, Tensor};
use rayon::prelude::*;

use crate::isa::Isa;
use memory::AlignedBytes;

/// Output rows in a panel: the lanes of the widest vector.
pub(crate) const PANEL: usize = 16;

/// What the numbers of a panel look like; selects the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Plain floats.
    Float(FloatType),
    /// Codes and scales in the order of [`coded`].
    Coded(GgmlType),
}

impl Layout {
    /// Positions along k in a chunk; rows are padded with zero weights to whole chunks.
    pub(crate) fn chunk_len(self) -> usize {
        match self {
            Layout::Float(FloatType::BF16) => 32,
            Layout::Float(_) => 16,
            Layout::Coded(kind) => kind_len(kind),
        }
    }

    /// Bytes of a chunk of sixteen rows: sixteen times the file's.
    pub(crate) fn chunk_bytes(self) -> usize {
        PANEL
            * match self {
                Layout::Float(FloatType::F32 | FloatType::BF16) => 64,
                Layout::Float(FloatType::F16) => 32,
                Layout::Coded(kind) => kind_bytes(kind),
            }
    }
}

fn kind_len(kind: GgmlType) -> usize {
    match kind {
        GgmlType::Q4_K | GgmlType::Q5_K | GgmlType::Q6_K => 256,
        _ => 32,
    }
}

/// Bytes of a block in the file (ggml's struct sizes).
fn kind_bytes(kind: GgmlType) -> usize {
    kind.block_bytes()
}

/// How the zero point of unsigned codes is subtracted: the integer dot starts at
/// `-zero * sum(x)` over the positions that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offset {
    /// What the codes are shifted by.
    pub(crate) zero: i32,
    /// Scales per 32 positions: 1 or 2.
    pub(crate) parts: usize,
}

/// The numbers that a matrix multiplies: how its rows of activations must be prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operand {
    /// `f32`, as they are.
    F32,
    /// Rounded to `bf16`.
    Bf16,
    /// `int8` with a scale per 32.
    Int8(Offset),
}

/// A weight `[rows, columns]` laid out for one ISA's kernels. Cloning shares the memory.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    rows: usize,
    columns: usize,
    pub(crate) layout: Layout,
    pub(crate) operand: Operand,
    pub(crate) isa: Isa,
    /// Chunks along a row.
    pub(crate) chunks: usize,
    memory: Arc<AlignedBytes>,
    /// Where this matrix's first panel begins.
    offset: usize,
}

impl PackedMatrix {
    /// Lays `tensor` out as a matrix of `[product of the leading dimensions, last dimension]`, in
    /// parallel on rayon's pool. `exact` chooses kernels that neither round activations nor
    /// accumulate in anything but `f32`.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for a format that has no kernel, [`BackendError::Memory`],
    /// or [`BackendError::Weight`] if the tensor's bytes do not fit its shape.
    pub fn pack(tensor: &Tensor, isa: Isa, exact: bool) -> Result<PackedMatrix, BackendError> {
        let layout = match tensor.format {
            Format::Float(kind) => Layout::Float(kind),
            Format::Ggml(kind) if coded::has_kernel(kind) => Layout::Coded(kind),
            Format::Ggml(_) | Format::Scaled(_) => {
                let feature = format!("weights in {}", tensor.format);
                return Err(BackendError::Unsupported { backend: "cpu", feature });
            }
        };
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let rows = tensor.shape.iter().rev().skip(1).product::<usize>();
        let chunks = columns.div_ceil(layout.chunk_len());
        let row_bytes = file_row_bytes(layout, columns);
        if tensor.codes.len() != rows * row_bytes {
            return Err(BackendError::Weight {
                name: format!("of shape {:?} in {}", tensor.shape, tensor.format),
                reason: format!(
                    "expected {rows} rows of {row_bytes} bytes, found {} bytes",
                    tensor.codes.len()
                ),
            });
        }
        let panel_bytes = chunks * layout.chunk_bytes();
        let mut memory = AlignedBytes::zeroed("weights", rows.div_ceil(PANEL) * panel_bytes)?;
        if panel_bytes > 0 && rows > 0 {
            // SAFETY: the buffer is exclusively ours and this long.
            let bytes =
                unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), memory.len()) };
            bytes.par_chunks_mut(panel_bytes).enumerate().for_each(|(panel, out)| {
                let first = panel * PANEL;
                let source = &tensor.codes[first * row_bytes..rows.min(first + PANEL) * row_bytes];
                fill_panel(layout, source, row_bytes, out);
            });
        }
        Ok(PackedMatrix {
            rows,
            columns,
            layout,
            operand: operand(layout, isa, exact),
            isa,
            chunks,
            memory: Arc::new(memory),
            offset: 0,
        })
    }

    /// Output rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that one pass over the matrix reads.
    pub fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Rows `range` as a matrix of its own, sharing the memory: one expert of a stack.
    ///
    /// # Panics
    /// If `range` leaves the matrix or does not start on a multiple of 16.
    pub fn slice_rows(&self, range: Range<usize>) -> PackedMatrix {
        assert!(range.start <= range.end && range.end <= self.rows, "rows out of range");
        assert!(range.start.is_multiple_of(PANEL), "a slice starts on a panel");
        let offset = self.offset + range.start / PANEL * self.panel_bytes();
        PackedMatrix { rows: range.len(), offset, ..self.clone() }
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(crate) fn panel_bytes(&self) -> usize {
        self.chunks * self.layout.chunk_bytes()
    }

    /// The first byte of a panel.
    pub(crate) fn panel(&self, index: usize) -> *const u8 {
        debug_assert!(index < self.panels());
        // SAFETY: panels lie within the memory by construction.
        unsafe { self.memory.as_ptr().add(self.offset + index * self.panel_bytes()) }
    }
}

fn file_row_bytes(layout: Layout, columns: usize) -> usize {
    match layout {
        Layout::Float(FloatType::F32) => columns * 4,
        Layout::Float(_) => columns * 2,
        Layout::Coded(kind) => columns.div_ceil(kind_len(kind)) * kind_bytes(kind),
    }
}

fn operand(layout: Layout, isa: Isa, exact: bool) -> Operand {
    match layout {
        Layout::Float(FloatType::BF16) if !exact && isa.has_bf16_dot() => Operand::Bf16,
        Layout::Coded(kind) if !exact => Operand::Int8(coded::offset(kind)),
        _ => Operand::F32,
    }
}

/// Writes the panel `out` from up to sixteen rows of the file; missing rows stay zero.
fn fill_panel(layout: Layout, source: &[u8], row_bytes: usize, out: &mut [u8]) {
    for (lane, row) in source.chunks_exact(row_bytes).enumerate() {
        match layout {
            Layout::Float(FloatType::F32) => interleave::<4>(row, lane, out),
            Layout::Float(FloatType::F16) => interleave::<2>(row, lane, out),
            Layout::Float(FloatType::BF16) => interleave::<4>(row, lane, out),
            Layout::Coded(kind) => {
                let blocks = row.chunks_exact(kind_bytes(kind));
                for (block, chunk) in blocks.zip(out.chunks_exact_mut(layout.chunk_bytes())) {
                    coded::place(kind, block, lane, chunk);
                }
            }
        }
    }
}

/// Puts each `UNIT` bytes of a row at its lane; a last partial unit is padded with zeros.
fn interleave<const UNIT: usize>(row: &[u8], lane: usize, out: &mut [u8]) {
    for (unit, vector) in row.chunks(UNIT).zip(out.chunks_exact_mut(UNIT * PANEL)) {
        vector[lane * UNIT..][..unit.len()].copy_from_slice(unit);
    }
}
