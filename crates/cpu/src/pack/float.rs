//! Panels of plain floats, which are only transposed.

use lathe_tensor::FloatType;

use super::PANEL;
use super::words::{RowPointers, Words, prefetch};

/// Bytes of a row that one step transposes.
const STEP: usize = 16;

/// Writes a panel from `row_bytes` bytes of each row. A unit of four bytes (an `f32`, a pair of
/// `bf16`) or two bytes (an `f16`) lies beside the same unit of the other rows. Bytes of `out`
/// behind the end of the rows stay zero.
///
/// # Safety
/// Rows have `row_bytes` bytes, `out` has room for sixteen times as many, rounded up to a unit. The
/// machine has `W`'s features.
#[inline(always)]
pub(crate) unsafe fn place_panel<W: Words>(
    kind: FloatType,
    rows: &RowPointers,
    row_bytes: usize,
    next: *const u8,
    out: *mut u8,
) {
    let halves = kind == FloatType::F16;
    let whole = row_bytes / STEP * STEP;
    for at in (0..whole).step_by(STEP) {
        prefetch(next.wrapping_add(at * PANEL), STEP * PANEL);
        // SAFETY: the caller's.
        unsafe {
            let words = W::load4(rows, at);
            let out = out.add(at * PANEL);
            for i in 0..4 {
                if halves {
                    words[i].store_halves(out.add(64 * i));
                    words[i].right(16).store_halves(out.add(64 * i + 32));
                } else {
                    words[i].store(out.add(64 * i));
                }
            }
        }
    }
    let unit = if halves { 2 } else { 4 };
    for byte in whole..row_bytes {
        let to = byte / unit * unit * PANEL + byte % unit;
        for lane in 0..PANEL {
            // SAFETY: the caller's.
            unsafe { *out.add(to + lane * unit) = *rows[lane].add(byte) };
        }
    }
}
