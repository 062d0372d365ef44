//! The table of a matrix's kernels: the types of the functions and of their arguments.

use super::block::BlockView;
use crate::isa::SEGMENT;
use crate::pack::PANEL;
use crate::pack::layout::Constants;

/// The most segments that are expanded at once.
pub(crate) const BATCH: usize = 8;

/// The arguments of a kernel: a run of segments of one panel, and rows of a block.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    /// The packed panel, or expanded codes or numbers.
    pub(crate) weights: *const u8,
    /// Bytes from one packed panel to the next, for kernels of several panels.
    pub(crate) panel_bytes: usize,
    /// Packed bytes that the next call expands. They are fetched meanwhile. Null if there are none.
    pub(crate) next: *const u8,
    /// Expanded scales, `[segments][parts][16]`.
    pub(crate) scales: *const f32,
    /// Expanded mins, `[segments][16]`.
    pub(crate) mins: *const f32,
    /// Segments of 32 positions.
    pub(crate) segments: usize,
    /// The activations at the first segment.
    pub(crate) rows: BlockView,
    /// The accumulators, `[R][16]`.
    pub(crate) acc: *mut f32,
    /// The constants of the matrix.
    pub(crate) constants: &'a Constants,
}

/// Memory for a batch of expanded segments.
#[repr(C, align(64))]
pub(crate) struct Scratch {
    /// Codes `[segments][8][64]` as bytes or as words, or `f32` numbers `[segments][32][16]`.
    pub(crate) weights: [f32; BATCH * SEGMENT * PANEL],
    /// `[segments][parts][16]`.
    pub(crate) scales: [f32; BATCH * 2 * PANEL],
    /// `[segments][16]`.
    pub(crate) mins: [f32; BATCH * PANEL],
}

/// A kernel for one instruction set and number of rows. Unsafe as
/// [`super::kernels::PanelKernel::run`].
pub(crate) type RunFn = unsafe fn(&Args<'_>);
/// Unsafe as [`super::kernels::Expand::expand`].
pub(crate) type ExpandFn = unsafe fn(*const u8, usize, &Constants, &mut Scratch);
/// Writes segments (whole chunks) as tiles of `bf16` pairs, `[segments][16][16][2]`. Unsafe as
/// [`super::kernels::Expand::expand`].
#[cfg(target_arch = "x86_64")]
pub(crate) type ToTilesFn = unsafe fn(*const u8, usize, &Constants, *mut u8);
/// The instance for the most rows up to the given number, and that number of rows.
pub(crate) type ChooseFn = fn(usize) -> (RunFn, usize);

/// The instance for the most rows and panels up to the given numbers, and those two numbers.
pub(crate) type DirectFn = fn(usize, usize) -> (RunFn, usize, usize);

/// The instance for a block that is padded to the given number of rows.
pub(crate) type BatchFn = fn(usize) -> RunFn;

/// The kernels of one matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernels {
    /// Multiplies one block of few rows straight from the packed panel.
    pub(crate) direct: Option<DirectFn>,
    /// The most rows that `direct` multiplies.
    pub(crate) direct_rows: usize,
    /// Multiplies one block of rows straight from the packed panel. `None` if codes must be
    /// decoded.
    pub(crate) plain: Option<ChooseFn>,
    /// Decodes a batch for `tile`. `None` if `tile` reads the packed panel.
    pub(crate) expand: Option<ExpandFn>,
    /// Multiplies any number of rows.
    pub(crate) tile: ChooseFn,
    /// Multiplies rows in the prefill form, if they are not multiplied as all others are.
    #[cfg(target_arch = "x86_64")]
    pub(crate) prompt: Option<Prompt>,
    /// Which rows in the decoding form AMX multiplies.
    pub(crate) tiles: Tiles,
    /// Whether coded activations are words ([`crate::isa::WordCodes`]).
    pub(crate) words: bool,
}

/// Which rows in the decoding form AMX tiles multiply.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tiles {
    /// No rows.
    None,
    /// All rows, in two parts of `bf16`. The packed panels are tiles.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    Split,
    /// Blocks of several rows, as codes.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    Codes(BatchFn),
}

impl Kernels {
    /// Whether rows in the prefill form have kernels of their own.
    pub(crate) fn has_prompt(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.prompt.is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The same kernels without those for rows in the prefill form.
    pub(crate) fn without_prompt(self) -> Kernels {
        Kernels {
            #[cfg(target_arch = "x86_64")]
            prompt: None,
            ..self
        }
    }

    /// The same kernels without those that round floats to `bf16`.
    pub(crate) fn exact(self) -> Kernels {
        Kernels { tiles: Tiles::None, ..self.without_prompt() }
    }
}

/// How a matrix multiplies rows in the prefill form.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prompt {
    /// Decodes segments to tiles. `None` if packed panels are tiles.
    pub(crate) to_tiles: Option<ToTilesFn>,
    /// The instructions that multiply the tiles.
    pub(crate) products: TileInstructions,
}

/// The instructions that multiply pairs of `bf16`.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(crate) enum TileInstructions {
    /// AMX.
    Amx,
    /// AVX-512's dots of `bf16` pairs.
    Dots,
}
