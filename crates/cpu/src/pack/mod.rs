//! `PackedMatrix`: a weight laid out for the kernels.
//!
//! Output rows are grouped in panels of sixteen, one lane of a vector each. A panel is one run of
//! memory along k (`layout`), which a kernel reads once from front to back. So every output element
//! adds over k in its own lane in a fixed order, for one row of activations or a thousand (batch
//! invariance). The packed form has as many bytes as the file, plus the padding of the last panel.
//! Decoding waits for these bytes.
//!
//! Packing moves bits and never rounds. It reads and writes words, in parallel over panels.

mod fill;
mod float;
mod ggml;
pub(crate) mod layout;
pub(crate) mod memory;
mod place;
mod scaled;
mod words;

use std::ops::Range;
use std::sync::Arc;

use lathe_program::BackendError;
use lathe_tensor::{Format, GlobalScale, ScaleType, Tensor};
use rayon::prelude::*;

use crate::isa::SEGMENT;
pub(crate) use ggml::table;
use layout::{Constants, PanelLayout};
use memory::{AlignedBytes, weight_memory};

/// Output rows in a panel: the number of lanes of the widest vector.
pub(crate) const PANEL: usize = 16;

/// Bytes that a thread packs at a time: one huge page, which the system clears when it is first
/// touched.
const TASK_BYTES: usize = 2 << 20;

/// A weight `[rows, columns]` laid out for kernels. Clones share the memory.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    rows: usize,
    columns: usize,
    pub(crate) layout: PanelLayout,
    pub(crate) constants: Constants,
    /// Chunks along a row.
    pub(crate) chunks: usize,
    memory: Arc<AlignedBytes>,
    /// Where this matrix's first panel begins.
    offset: usize,
}

impl PackedMatrix {
    /// Checks that there are kernels for rows of `columns` numbers in `format`. [`Self::pack`]
    /// checks the same. This is for callers that have no tensor yet.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`], which names what has no kernel.
    pub fn check(format: Format, columns: usize) -> Result<(), BackendError> {
        layout_of(format, columns).map(drop)
    }

    /// Lays `tensor` out as a matrix of `[product of the leading dimensions, last dimension]`, in
    /// parallel on rayon's pool.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for a format that has no kernel, [`BackendError::Memory`],
    /// or [`BackendError::Weight`] if the tensor's bytes do not fit its shape.
    pub fn pack(tensor: &Tensor) -> Result<PackedMatrix, BackendError> {
        let (rows, columns) = (tensor.rows(), tensor.columns());
        let layout = layout_of(tensor.format, columns)?;
        let chunks = columns.div_ceil(layout.chunk_segments() * SEGMENT);
        let filled = chunks * layout.chunk_bytes();
        let panel_bytes = panel_bytes(filled);
        let bytes = rows.div_ceil(PANEL) * panel_bytes;
        let (memory, offset) = weight_memory(bytes)?;
        if bytes > 0 {
            // SAFETY: these bytes of the buffer were given to this call alone, and are zeroed.
            let out = unsafe {
                std::slice::from_raw_parts_mut(memory.as_ptr().add(offset).cast_mut(), bytes)
            };
            let task_panels = (TASK_BYTES / panel_bytes).max(1);
            out.par_chunks_mut(task_panels * panel_bytes).enumerate().for_each(|(task, out)| {
                let first = task * task_panels * PANEL;
                fill::populate(tensor, first..rows.min(first + task_panels * PANEL));
                for (panel, out) in out.chunks_mut(panel_bytes).enumerate() {
                    let first = first + panel * PANEL;
                    let rows = first..rows.min(first + PANEL);
                    fill::fill_panel(tensor, layout, rows, &mut out[..filled]);
                }
            });
        }
        Ok(PackedMatrix {
            rows,
            columns,
            layout,
            constants: constants(tensor, layout)?,
            chunks,
            memory,
            offset,
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

    /// Bytes that the matrix takes.
    pub fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Rows `range` as a matrix of their own, which shares the memory. One expert of a stack is
    /// such a matrix.
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

    /// Bytes from a panel to the next.
    pub(crate) fn panel_bytes(&self) -> usize {
        panel_bytes(self.chunks * self.layout.chunk_bytes())
    }

    /// Segments of 32 positions along a row, padding included.
    pub(crate) fn segments(&self) -> usize {
        self.chunks * self.layout.chunk_segments()
    }

    /// The address of segment `segment` of a panel, which must be the first of a chunk.
    pub(crate) fn segment(&self, panel: usize, segment: usize) -> *const u8 {
        let chunk = segment / self.layout.chunk_segments();
        // SAFETY: the chunk lies within the panel.
        unsafe { self.panel(panel).add(chunk * self.layout.chunk_bytes()) }
    }

    /// The first byte of a panel.
    pub(crate) fn panel(&self, index: usize) -> *const u8 {
        debug_assert!(index < self.panels());
        // SAFETY: panels lie within the memory by construction.
        unsafe { self.memory.as_ptr().add(self.offset + index * self.panel_bytes()) }
    }
}

/// The layout of a format's panels, for rows of `columns`.
pub(crate) fn layout_of(format: Format, columns: usize) -> Result<PanelLayout, BackendError> {
    match format {
        Format::Float(kind) => Ok(PanelLayout::Float(kind)),
        Format::Ggml(kind) => Ok(PanelLayout::of_ggml(kind)),
        Format::Scaled(format) => scaled::layout(&format, columns),
    }
}

/// Bytes from a panel of `bytes` to the next. Panels that are read side by side must not lie a
/// multiple of 4 KiB apart, because they would compete for the same lines of the first-level cache.
fn panel_bytes(bytes: usize) -> usize {
    const GAP: usize = 192;
    if bytes > 0 && bytes.is_multiple_of(4096) { bytes + GAP } else { bytes }
}

fn constants(tensor: &Tensor, layout: PanelLayout) -> Result<Constants, BackendError> {
    let mut constants = Constants {
        group_segments: 1,
        scale: ScaleType::F16,
        segment_bytes: layout.chunk_bytes().div_ceil(layout.chunk_segments()),
        multiplier: multiplier(tensor)?,
    };
    match layout {
        PanelLayout::Coded(layout::Codes::E2m1, _) => constants.multiplier *= 0.5,
        PanelLayout::Coded(_, layout::Scales::Group { segments, kind, .. }) => {
            (constants.group_segments, constants.scale) = (segments, kind);
        }
        _ => {}
    }
    Ok(constants)
}

/// The factor of every scale of the tensor.
fn multiplier(tensor: &Tensor) -> Result<f32, BackendError> {
    let globals = match &tensor.global {
        GlobalScale::One => return Ok(1.0),
        GlobalScale::Multiply(globals) | GlobalScale::Divide(globals) => globals,
    };
    if globals.windows(2).any(|pair| pair[0] != pair[1]) {
        let feature = "a stack of matrices with different global scales as one matrix".to_owned();
        return Err(BackendError::Unsupported { backend: "cpu", feature });
    }
    Ok(tensor.global.apply(0, 1.0))
}
