//! Writes panels from a tensor's rows, with the widest vectors of the machine. Packing moves bits,
//! so every width gives the same bytes.
//!
//! Loading a model reads the file's bytes once and writes as many. The system clears the memory
//! when it is first touched, which cannot be avoided. The rest should run at the memory's speed.
//! [`super::words`] transposes in registers, [`populate`] fills the page table, and the packing
//! loops prefetch.
//!
//! docs/performance-notes.md has measurements.

use std::ops::Range;

use lathe_tensor::{FloatType, Format, GgmlType, Tensor};

use super::PANEL;
use super::layout::PanelLayout;
use super::words::{RowPointers, Words};
use super::{float, ggml, scaled};
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::isa::features::with_features;

/// Makes the pages that hold rows `rows` of `tensor` readable in one call. A file's pages are in
/// memory but not in this process's page table. One fault for each 64 KiB costs more than the call,
/// and prefetches of pages outside of the table are dropped.
pub(crate) fn populate(tensor: &Tensor, rows: Range<usize>) {
    let row_bytes = match tensor.format {
        Format::Scaled(format) => (tensor.columns() * format.element.bits()).div_ceil(8),
        _ => tensor.row_bytes(),
    };
    populate_bytes(&tensor.codes[rows.start * row_bytes..rows.end * row_bytes]);
}

#[cfg(target_os = "linux")]
fn populate_bytes(bytes: &[u8]) {
    const PAGE: usize = 4096;
    let start = bytes.as_ptr() as usize / PAGE * PAGE;
    let end = bytes.as_ptr() as usize + bytes.len();
    // SAFETY: the pages of memory that is borrowed; the call changes no contents, and a refusal (by
    // an older kernel) leaves the faults.
    unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_POPULATE_READ) };
}

#[cfg(not(target_os = "linux"))]
fn populate_bytes(_bytes: &[u8]) {}

/// The rows of a tensor that become one panel.
enum PanelRows<'a> {
    Ggml(GgmlType, Lines<'a>),
    Float(FloatType, Lines<'a>),
    Scaled(&'a Tensor, Range<usize>),
}

/// Sixteen rows of bytes.
struct Lines<'a> {
    rows: RowPointers,
    row_bytes: usize,
    /// The address behind these rows, where the next panel's rows lie.
    next: *const u8,
    /// Zeros, which replace rows past the end of the matrix.
    _zeros: Vec<u8>,
    _bytes: &'a [u8],
}

impl<'a> Lines<'a> {
    fn new(tensor: &'a Tensor, rows: Range<usize>) -> Self {
        let row_bytes = tensor.row_bytes();
        let bytes = &tensor.codes[rows.start * row_bytes..rows.end * row_bytes];
        let zeros = if rows.len() < PANEL { vec![0; row_bytes] } else { Vec::new() };
        let mut pointers = [zeros.as_ptr(); PANEL];
        if row_bytes > 0 {
            for (pointer, row) in pointers.iter_mut().zip(bytes.chunks_exact(row_bytes)) {
                *pointer = row.as_ptr();
            }
        }
        let next = bytes.as_ptr_range().end;
        Self { rows: pointers, row_bytes, next, _zeros: zeros, _bytes: bytes }
    }
}

/// Writes a panel from up to sixteen rows of the tensor. `out` is zeroed.
pub(crate) fn fill_panel(tensor: &Tensor, layout: PanelLayout, rows: Range<usize>, out: &mut [u8]) {
    let widest = [Isa::Avx512, Isa::Avx2].into_iter().find(|isa| isa.is_available());
    fill_panel_with(widest.unwrap_or(Isa::Portable), tensor, layout, rows, out);
}

/// As [`fill_panel`] with the vectors of `isa`, which this machine must have.
fn fill_panel_with(
    isa: Isa,
    tensor: &Tensor,
    layout: PanelLayout,
    rows: Range<usize>,
    out: &mut [u8],
) {
    let source = match tensor.format {
        Format::Scaled(_) => PanelRows::Scaled(tensor, rows),
        Format::Ggml(kind) => PanelRows::Ggml(kind, Lines::new(tensor, rows)),
        Format::Float(kind) => PanelRows::Float(kind, Lines::new(tensor, rows)),
    };
    #[cfg(target_arch = "x86_64")]
    {
        use super::words::x86::{Avx2, Avx512};
        with_features! { avx512 =>
            fn avx512(source: &PanelRows<'_>, layout: PanelLayout, out: &mut [u8]) {
                // SAFETY: the features are enabled here.
                unsafe { fill::<Avx512>(source, layout, out) }
            }
        }
        with_features! { avx2 =>
            fn avx2(source: &PanelRows<'_>, layout: PanelLayout, out: &mut [u8]) {
                // SAFETY: the features are enabled here.
                unsafe { fill::<Avx2>(source, layout, out) }
            }
        }
        match isa {
            // SAFETY: available, so the caller promised.
            Isa::Avx512 => return unsafe { avx512(&source, layout, out) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { avx2(&source, layout, out) },
            _ => {}
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    // SAFETY: plain Rust needs no feature.
    unsafe { fill::<[u32; PANEL]>(&source, layout, out) }
}

/// # Safety
/// The machine has `W`'s features.
#[inline(always)]
unsafe fn fill<W: Words>(source: &PanelRows<'_>, layout: PanelLayout, out: &mut [u8]) {
    let chunk_bytes = layout.chunk_bytes();
    match source {
        PanelRows::Ggml(kind, lines) => {
            let chunks = lines.row_bytes / kind.block_bytes();
            assert!(out.len() >= chunks * chunk_bytes, "room for the panel");
            // SAFETY: each row has so many blocks, and `out` the room.
            unsafe {
                ggml::place_panel::<W>(*kind, &lines.rows, chunks, lines.next, out.as_mut_ptr())
            }
        }
        PanelRows::Float(kind, lines) => {
            let row_bytes = lines.row_bytes;
            assert!(out.len() >= row_bytes.next_multiple_of(4) * PANEL, "room for the panel");
            // SAFETY: as above.
            unsafe {
                float::place_panel::<W>(*kind, &lines.rows, row_bytes, lines.next, out.as_mut_ptr())
            }
        }
        PanelRows::Scaled(tensor, rows) => {
            // SAFETY: the caller's features.
            unsafe { scaled::place_panel::<W>(tensor, layout, rows.clone(), out) }
        }
    }
}

#[cfg(test)]
mod tests {
    use lathe_tensor::{Block, Bytes, Element, GlobalScale, ScaleType, ScaledFormat, ZeroPoint};

    use super::*;

    fn bytes(count: usize) -> Bytes {
        let mut state = 1u64;
        let next = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as u8
        };
        Bytes::new((0..count).map(next).collect::<Vec<u8>>())
    }

    fn scaled(element: Element, block: Block, scale: ScaleType, zero: ZeroPoint) -> Format {
        Format::Scaled(ScaledFormat { element, block, scale, zero })
    }

    /// Random bits of `[rows, columns]`.
    fn tensor(format: Format, rows: usize, columns: usize) -> Tensor {
        let shape = vec![rows, columns];
        let Format::Scaled(kind) = format else {
            let codes = bytes(format.bytes_for(&shape).expect("whole blocks"));
            return Tensor::new(shape, format, codes).expect("a tensor");
        };
        let blocks = kind.grid(&shape).expect("a grid").len();
        let codes = bytes(rows * (columns * kind.element.bits()).div_ceil(8));
        let zeros = bytes(if kind.zero == ZeroPoint::Int { blocks } else { 0 });
        let scales = bytes(blocks * kind.scale.bytes());
        let global = match kind.scale {
            ScaleType::E4M3Global => GlobalScale::Multiply(vec![1.0]),
            _ => GlobalScale::One,
        };
        Tensor::new_scaled(shape, format, codes, scales, zeros, global).expect("a tensor")
    }

    /// The bytes of a panel, and a margin that nothing may write.
    fn panel(isa: Isa, tensor: &Tensor, rows: Range<usize>) -> Vec<u8> {
        const MARGIN: usize = 64;
        let layout = match tensor.format {
            Format::Float(kind) => PanelLayout::Float(kind),
            Format::Ggml(kind) => PanelLayout::of_ggml(kind),
            Format::Scaled(format) => scaled::layout(&format, tensor.columns()).expect("a layout"),
        };
        let chunk = layout.chunk_segments() * crate::isa::SEGMENT;
        let filled = tensor.columns().div_ceil(chunk) * layout.chunk_bytes();
        let mut out = vec![0; filled];
        fill_panel_with(isa, tensor, layout, rows, &mut out);
        out.extend([0; MARGIN]);
        out
    }

    fn formats() -> Vec<Format> {
        let int = Element::Int;
        let scaled = [
            Format::Scaled(ScaledFormat::MXFP4),
            Format::Scaled(ScaledFormat::NVFP4),
            scaled(int(4), Block::Channel, ScaleType::F16, ZeroPoint::None),
            scaled(int(8), Block::Channel, ScaleType::F32, ZeroPoint::None),
            scaled(int(4), Block::Group(128), ScaleType::BF16, ZeroPoint::Int),
            scaled(int(8), Block::Group(64), ScaleType::F32, ZeroPoint::Int),
        ];
        let floats = [FloatType::F32, FloatType::F16, FloatType::BF16].map(Format::Float);
        floats.into_iter().chain(GgmlType::ALL.map(Format::Ggml)).chain(scaled).collect()
    }

    #[test]
    fn every_width_packs_alike() {
        let wide = [Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_available());
        let wide: Vec<Isa> = wide.collect();
        for format in formats() {
            let columns = match (format, format.block_len()) {
                (Format::Float(_), _) => vec![1, 7, 32, 40, 300],
                (_, 1) => vec![5, 32, 40, 300],
                (_, block) => vec![block, 3 * block],
            };
            for columns in columns {
                let tensor = tensor(format, 21, columns);
                for rows in [0..16, 5..21, 16..21, 20..21] {
                    let plain = panel(Isa::Portable, &tensor, rows.clone());
                    for &isa in &wide {
                        let found = panel(isa, &tensor, rows.clone());
                        assert!(found == plain, "{format} {columns} columns {rows:?} {isa:?}");
                    }
                }
            }
        }
    }

    /// A panel is a permutation of its rows' bits. Packing one row alone shows where its bits go.
    /// Tests beside the kernels check the products of packed matrices.
    #[test]
    fn rows_do_not_mix() {
        for format in formats() {
            let tensor = tensor(format, 16, 2 * format.block_len().max(128));
            let whole = panel(Isa::Portable, &tensor, 0..16);
            let mut together = vec![0u8; whole.len()];
            let nothing = panel(Isa::Portable, &zeros_like(&tensor), 0..16);
            for row in 0..16 {
                let alone = panel(Isa::Portable, &only_row(&tensor, row), 0..16);
                let bits = together.iter_mut().zip(alone.iter().zip(&nothing));
                bits.for_each(|(all, (one, none))| *all ^= one ^ none);
            }
            together.iter_mut().zip(&nothing).for_each(|(all, none)| *all ^= none);
            assert!(together == whole, "{format}");
        }
    }

    /// The tensor with all bits zero but those of `row`.
    fn only_row(tensor: &Tensor, row: usize) -> Tensor {
        let only = |plane: &Bytes| {
            let each = plane.len() / tensor.rows();
            let mut bytes = vec![0; plane.len()];
            bytes[row * each..][..each].copy_from_slice(&plane[row * each..][..each]);
            Bytes::new(bytes)
        };
        let (codes, scales) = (only(&tensor.codes), only(&tensor.scales));
        Tensor { codes, scales, zeros: only(&tensor.zeros), ..tensor.clone() }
    }

    fn zeros_like(tensor: &Tensor) -> Tensor {
        let zeros = |plane: &Bytes| Bytes::new(vec![0; plane.len()]);
        let (codes, scales) = (zeros(&tensor.codes), zeros(&tensor.scales));
        Tensor { codes, scales, zeros: zeros(&tensor.zeros), ..tensor.clone() }
    }
}
