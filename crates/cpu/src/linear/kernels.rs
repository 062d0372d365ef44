//! The arithmetic of one panel against up to sixteen rows, generic over ISA and format.
//!
//! Each output is one lane of one accumulator. Terms are added to it in the order of k:
//! ```text
//! coded: acc = fma(dw * dx, f32(-zero * sum(qx) + sum(qw * qx)), acc)  a segment (or half) at a
//!                                                                      time, qx = 2^n * high + low
//!        acc = fma(min, dx * sum(qx), acc)                             formats with a min
//! float: acc = fma(w, x, acc)                                          a position at a time
//! fp8  : acc = fma(w * dw, x, acc)                                     a position at a time
//! ```
//! The integer dot is exact, so any instruction set may compute it in any order. The number of rows
//! (`R`) changes how many accumulators exist, but not what is added to one of them. Codes may come
//! straight from the panel ([`Direct`], up to eight rows of one block), or from a scratch where
//! [`Expand`] put eight segments for all rows ([`Tile`]). That changes nothing either.

use std::marker::PhantomData;

use super::block::{BLOCK, BlockView, CODE_BYTES};
use super::codes::{Coded, Decoded, Group, Tail, group_scale};
use super::table::{Args, Scratch};
use crate::isa::{self, ByteCodes, ByteDots, SEGMENT, Simd, WordCodes, WordDots, unroll};
use crate::pack::PANEL;
use crate::pack::layout::{Constants, Fineness};

/// The arithmetic of a run of segments. Each type below implements it for some formats.
pub(crate) trait PanelKernel: 'static {
    /// Whether the kernel has an instance for every number of rows that blocks are padded to.
    const TUNED: bool;
    /// # Safety
    /// `S` runs here; `args` covers `segments` segments of this kernel's weights and of `R` rows
    /// of its operand; `acc` has `R` vectors.
    unsafe fn run<S: CodedSimd, const R: usize>(args: &Args<'_>);
}

/// Vectors with the steps of kernels that depend on the form of coded activations.
pub(crate) trait CodedSimd: Simd<Codes: CodeForm<Self>> {}

impl<S: Simd<Codes: CodeForm<S>>> CodedSimd for S {}

/// The steps of kernels that differ between activations of bytes and of words.
pub(crate) trait CodeForm<S: Simd> {
    /// Whether activations and expanded codes are words.
    const WORDS: bool;

    /// Adds the dots of positions that share a scale to the accumulators of `R` rows.
    ///
    /// # Safety
    /// `S` runs here; `rows` has `R` rows of `4 * N` positions.
    unsafe fn add_dots<const N: usize, const R: usize>(
        widths: [u32; 2],
        codes: &[S::B; N],
        scale: S::F,
        rows: &BlockView,
        acc: &mut [S::F; R],
    );

    /// Writes a vector of codes where [`CodeForm::add_expanded`] reads them.
    ///
    /// # Safety
    /// `S` runs here; `to` has room for 64 bytes, or 128 of words.
    unsafe fn store(to: *mut u8, codes: S::B);

    /// Adds the dots of one expanded segment to the accumulators of `R` rows.
    ///
    /// # Safety
    /// `S` runs here; `codes`, `scales` and `mins` hold the segment, `rows` has `R` rows.
    unsafe fn add_expanded<const R: usize, const PARTS: usize, const MIN: bool>(
        widths: [u32; 2],
        codes: *const u8,
        scales: *const f32,
        mins: *const f32,
        rows: &BlockView,
        acc: &mut [S::F; R],
    );
}

impl<S: ByteDots> CodeForm<S> for ByteCodes {
    const WORDS: bool = false;

    #[inline(always)]
    unsafe fn add_dots<const N: usize, const R: usize>(
        widths: [u32; 2],
        codes: &[S::B; N],
        scale: S::F,
        rows: &BlockView,
        acc: &mut [S::F; R],
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            unroll!(r in R => {
                let x = rows.x.add(CODE_BYTES * r).cast();
                let dot = S::dot::<N>(widths, *rows.offsets.add(r), codes, x);
                let factor = S::mul(scale, S::splat(*rows.scales.add(r)));
                acc[r] = S::fma(factor, S::to_f(dot), acc[r]);
            });
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut u8, codes: S::B) {
        // SAFETY: as the caller promises.
        unsafe { S::store_b(to, codes) }
    }

    #[inline(always)]
    unsafe fn add_expanded<const R: usize, const PARTS: usize, const MIN: bool>(
        widths: [u32; 2],
        codes: *const u8,
        scales: *const f32,
        mins: *const f32,
        rows: &BlockView,
        acc: &mut [S::F; R],
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut vectors = [S::load_b(codes); 8];
            unroll!(j in 8 => {
                vectors[j] = S::load_b(codes.add(64 * j));
            });
            add_segment::<S, R, PARTS, MIN>(widths, &vectors, scales, mins, rows, acc);
        }
    }
}

impl<S: WordDots> CodeForm<S> for WordCodes {
    const WORDS: bool = true;

    #[inline(always)]
    unsafe fn add_dots<const N: usize, const R: usize>(
        _widths: [u32; 2],
        codes: &[S::B; N],
        scale: S::F,
        rows: &BlockView,
        acc: &mut [S::F; R],
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            let dots = S::dots::<N, R>(rows.offsets, codes, rows.x.cast(), CODE_BYTES);
            add_scaled::<S, R>(scale, &dots, rows, acc);
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut u8, codes: S::B) {
        // SAFETY: as the caller promises.
        unsafe { S::store_words(to, codes) }
    }

    #[inline(always)]
    unsafe fn add_expanded<const R: usize, const PARTS: usize, const MIN: bool>(
        _widths: [u32; 2],
        codes: *const u8,
        scales: *const f32,
        mins: *const f32,
        rows: &BlockView,
        acc: &mut [S::F; R],
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            unroll!(part in PARTS => {
                let codes = codes.add(part * SEGMENT * 2 * PANEL / PARTS);
                let x = rows.x.add(part * CODE_BYTES / PARTS);
                let start = rows.offsets.add(part * rows.stride);
                let dots = S::dot_words::<R>(SEGMENT / 2 / PARTS, start, codes, x, CODE_BYTES);
                add_scaled::<S, R>(S::load(scales.add(part * PANEL)), &dots, rows, acc);
            });
            if MIN {
                add_min::<S, R>(mins, rows, acc);
            }
        }
    }
}

/// Whether the vectors' coded activations are words.
pub(crate) const fn words<S: CodedSimd>() -> bool {
    <S::Codes as CodeForm<S>>::WORDS
}

/// A segment's min times the sum of its activations.
#[inline(always)]
unsafe fn add_min<S: Simd, const R: usize>(
    mins: *const f32,
    rows: &BlockView,
    acc: &mut [S::F; R],
) {
    // SAFETY: the caller gives `R` rows and the segment's mins.
    unsafe {
        let min = S::load(mins);
        unroll!(r in R => {
            acc[r] = S::fma(min, S::splat(*rows.sums.add(r)), acc[r]);
        });
    }
}

/// Integer dots of one segment, added to the accumulators of `R` rows.
#[inline(always)]
unsafe fn add_segment<S: CodedSimd, const R: usize, const PARTS: usize, const MIN: bool>(
    widths: [u32; 2],
    codes: &[S::B; 8],
    scales: *const f32,
    mins: *const f32,
    rows: &BlockView,
    acc: &mut [S::F; R],
) {
    // SAFETY: the caller gives `R` rows and the segment's vectors of scales and mins.
    unsafe {
        if PARTS == 1 {
            S::Codes::add_dots::<8, R>(widths, codes, S::load(scales), rows, acc);
        } else {
            let low = [codes[0], codes[1], codes[2], codes[3]];
            let high = [codes[4], codes[5], codes[6], codes[7]];
            let second = BlockView {
                x: rows.x.add(if words::<S>() { SEGMENT } else { SEGMENT / 2 }),
                offsets: rows.offsets.add(rows.stride),
                ..*rows
            };
            S::Codes::add_dots::<4, R>(widths, &low, S::load(scales), rows, acc);
            let scale = S::load(scales.add(PANEL));
            S::Codes::add_dots::<4, R>(widths, &high, scale, &second, acc);
        }
        if MIN {
            add_min::<S, R>(mins, rows, acc);
        }
    }
}

/// Dots times both scales.
#[inline(always)]
unsafe fn add_scaled<S: Simd, const R: usize>(
    scale: S::F,
    dots: &[S::I; R],
    rows: &BlockView,
    acc: &mut [S::F; R],
) {
    // SAFETY: the caller gives `R` rows.
    unsafe {
        unroll!(r in R => {
            let factor = S::mul(scale, S::splat(*rows.scales.add(r)));
            acc[r] = S::fma(factor, S::to_f(dots[r]), acc[r]);
        });
    }
}

/// The accumulators of `R` rows.
#[inline(always)]
pub(super) unsafe fn load_acc<S: Simd, const R: usize>(acc: *const f32) -> [S::F; R] {
    // SAFETY: the caller gives `R` vectors.
    unsafe {
        let mut all = [S::splat(0.0); R];
        unroll!(r in R => {
            all[r] = S::load(acc.add(r * PANEL));
        });
        all
    }
}

#[inline(always)]
pub(super) unsafe fn store_acc<S: Simd, const R: usize>(acc: *mut f32, all: [S::F; R]) {
    // SAFETY: the caller gives `R` vectors.
    unsafe {
        unroll!(r in R => {
            S::store(acc.add(r * PANEL), all[r]);
        });
    }
}

/// Multiplies `P` packed panels by coded activations. Several panels give the processor more
/// independent sums and the memory more streams to serve.
pub(crate) struct Direct<C, const P: usize>(PhantomData<C>);

/// Bytes between what a kernel reads and what it asks the memory for (docs/performance-notes.md has
/// the measurement).
pub(super) const AHEAD_BYTES: usize = 4096;
/// The bytes from a byte of one of `panels` neighbouring panels to the byte that is read
/// [`AHEAD_BYTES`] later. Past the panel's end that byte lies in the panel that is read next in its
/// place.
#[inline(always)]
fn ahead(offset: usize, panels: usize, panel_bytes: usize) -> usize {
    let next = if offset + AHEAD_BYTES < panel_bytes { 0 } else { (panels - 1) * panel_bytes };
    AHEAD_BYTES + next
}

/// Floats from one panel's accumulators to the next panel's.
const PRODUCT: usize = BLOCK * PANEL;

impl<C: Coded, const P: usize> PanelKernel for Direct<C, P> {
    const TUNED: bool = true;

    #[inline(always)]
    unsafe fn run<S: CodedSimd, const R: usize>(args: &Args<'_>) {
        // SAFETY: as the caller promises; a chunk has at most eight segments of two parts.
        unsafe {
            let constants = args.constants;
            let in_chunk = C::segments(constants);
            let mut acc = [[S::splat(0.0); R]; P];
            unroll!(p in P => {
                acc[p] = load_acc::<S, R>(args.acc.add(p * PRODUCT));
            });
            let mut rows = args.rows;
            let mut panel = args.weights;
            let (mut scales, mut mins) = ([[0f32; 16 * PANEL]; P], [[0f32; 8 * PANEL]; P]);
            for _ in 0..args.segments / in_chunk {
                let ahead = ahead(panel.offset_from_unsigned(args.weights), P, args.panel_bytes);
                unroll!(p in P => {
                    let tail = panel.add(p * args.panel_bytes + in_chunk * C::SEGMENT_BYTES);
                    prefetch(tail.wrapping_add(ahead), C::tail_bytes(constants));
                    let (scales, mins) = (scales[p].as_mut_ptr(), mins[p].as_mut_ptr());
                    C::scales::<S>(tail, constants, Decoded { scales, mins });
                });
                for segment in 0..in_chunk {
                    unroll!(p in P => {
                        let packed = panel.add(p * args.panel_bytes);
                        prefetch(packed.wrapping_add(ahead), C::SEGMENT_BYTES);
                        let codes = C::codes::<S>(packed);
                        let scales = scales[p].as_ptr().add(segment * C::PARTS * PANEL);
                        let mins = mins[p].as_ptr().add(segment * PANEL);
                        if C::PARTS == 1 {
                            add_segment_of::<S, C, R, 1>(&codes, scales, mins, &rows, &mut acc[p]);
                        } else {
                            add_segment_of::<S, C, R, 2>(&codes, scales, mins, &rows, &mut acc[p]);
                        }
                    });
                    rows = rows.after::<CODE_BYTES>(1, C::PARTS);
                    panel = panel.add(C::SEGMENT_BYTES);
                }
                panel = panel.add(C::tail_bytes(constants));
            }
            unroll!(p in P => {
                store_acc::<S, R>(args.acc.add(p * PRODUCT), acc[p]);
            });
        }
    }
}

/// [`add_segment`] with the format's own constants.
#[inline(always)]
unsafe fn add_segment_of<S: CodedSimd, C: Coded, const R: usize, const PARTS: usize>(
    codes: &[S::B; 8],
    scales: *const f32,
    mins: *const f32,
    rows: &BlockView,
    acc: &mut [S::F; R],
) {
    // SAFETY: as the caller promises.
    unsafe {
        let widths = [C::BITS, Fineness::of_bits(C::BITS).low_bits()];
        if C::MIN {
            add_segment::<S, R, PARTS, true>(widths, codes, scales, mins, rows, acc);
        } else {
            add_segment::<S, R, PARTS, false>(widths, codes, scales, mins, rows, acc);
        }
    }
}

/// Decodes a batch for kernels that many rows share.
pub(crate) trait Expand: 'static {
    /// # Safety
    /// `S` runs here, and `panel` has `segments` (at most [`super::table::BATCH`]) segments in
    /// whole chunks.
    unsafe fn expand<S: CodedSimd>(
        panel: *const u8,
        segments: usize,
        constants: &Constants,
        out: &mut Scratch,
    );
}

/// Bytes of a segment of expanded codes.
const fn expanded_bytes<S: CodedSimd>() -> usize {
    SEGMENT * PANEL * if words::<S>() { 2 } else { 1 }
}

/// To unsigned bytes or words, and scales.
pub(crate) struct ToCodes<C>(PhantomData<C>);

impl<C: Coded> Expand for ToCodes<C> {
    #[inline(always)]
    unsafe fn expand<S: CodedSimd>(
        panel: *const u8,
        segments: usize,
        constants: &Constants,
        out: &mut Scratch,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut panel = panel;
            let mut codes = out.weights.as_mut_ptr().cast::<u8>();
            let mut decoded =
                Decoded { scales: out.scales.as_mut_ptr(), mins: out.mins.as_mut_ptr() };
            let in_chunk = C::segments(constants);
            for _ in 0..segments / in_chunk {
                for _ in 0..in_chunk {
                    let vectors = C::codes::<S>(panel);
                    unroll!(j in 8 => {
                        S::Codes::store(codes.add(expanded_bytes::<S>() / 8 * j), vectors[j]);
                    });
                    panel = panel.add(C::SEGMENT_BYTES);
                    codes = codes.add(expanded_bytes::<S>());
                }
                C::scales::<S>(panel, constants, decoded);
                panel = panel.add(C::tail_bytes(constants));
                decoded.scales = decoded.scales.add(in_chunk * C::PARTS * PANEL);
                decoded.mins = decoded.mins.add(in_chunk * PANEL);
            }
        }
    }
}

/// To `f32` weights.
pub(crate) struct ToFloats<C>(PhantomData<C>);

impl<C: Coded> Expand for ToFloats<C> {
    #[inline(always)]
    unsafe fn expand<S: CodedSimd>(
        panel: *const u8,
        segments: usize,
        constants: &Constants,
        out: &mut Scratch,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut panel = panel;
            let mut to = out.weights.as_mut_ptr();
            let decoded = Decoded { scales: out.scales.as_mut_ptr(), mins: out.mins.as_mut_ptr() };
            let in_chunk = C::segments(constants);
            for _ in 0..segments / in_chunk {
                C::scales::<S>(panel.add(in_chunk * C::SEGMENT_BYTES), constants, decoded);
                for segment in 0..in_chunk {
                    let codes = C::codes::<S>(panel);
                    let zero = S::splat(-C::ZERO as f32);
                    let min = if C::MIN {
                        S::load(decoded.mins.add(segment * PANEL))
                    } else {
                        S::splat(0.0)
                    };
                    unroll!(j in 8 => {
                        let part = segment * C::PARTS + j * C::PARTS / 8;
                        let scale = S::load(decoded.scales.add(part * PANEL));
                        let words = S::b_to_i(codes[j]);
                        unroll!(b in 4 => {
                            let code = S::and(S::shr_by(words, 8 * b as u32), 255);
                            let value = S::fma(S::add(S::to_f(code), zero), scale, min);
                            S::store(to.add((4 * j + b) * PANEL), value);
                        });
                    });
                    panel = panel.add(C::SEGMENT_BYTES);
                    to = to.add(SEGMENT * PANEL);
                }
                panel = panel.add(C::tail_bytes(constants));
            }
        }
    }
}

/// Floats of 16 bits to `f32` weights.
pub(crate) struct ToWide<W>(PhantomData<W>);

impl<W: Float> Expand for ToWide<W> {
    #[inline(always)]
    unsafe fn expand<S: CodedSimd>(
        panel: *const u8,
        segments: usize,
        _: &Constants,
        out: &mut Scratch,
    ) {
        let to = out.weights.as_mut_ptr();
        for pair in 0..segments * SEGMENT / 2 {
            // SAFETY: as the caller promises.
            unsafe {
                let (even, odd) = W::pair::<S>(panel.add(pair * W::PAIR_BYTES));
                S::store(to.add(2 * pair * PANEL), even);
                S::store(to.add((2 * pair + 1) * PANEL), odd);
            }
        }
    }
}

/// fp8 under the scales of [`Group`] to `f32` weights.
pub(crate) struct ToScaledFloats<W>(PhantomData<W>);

impl<W: Float> Expand for ToScaledFloats<W> {
    #[inline(always)]
    unsafe fn expand<S: CodedSimd>(
        panel: *const u8,
        segments: usize,
        constants: &Constants,
        out: &mut Scratch,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut panel = panel;
            let mut to = out.weights.as_mut_ptr();
            let pairs = constants.group_segments * SEGMENT / 2;
            for _ in 0..segments / constants.group_segments {
                let tail = panel.add(pairs * W::PAIR_BYTES);
                let scale = group_scale::<S>(tail, constants.scale);
                for _ in 0..pairs {
                    let (even, odd) = W::pair::<S>(panel);
                    S::store(to, S::mul(even, scale));
                    S::store(to.add(PANEL), S::mul(odd, scale));
                    panel = panel.add(W::PAIR_BYTES);
                    to = to.add(2 * PANEL);
                }
                panel = panel.add(Group::<false>::tail_bytes(constants));
            }
        }
    }
}

/// Asks for the cache lines of `len` bytes from `start` on. They need not be readable.
#[inline(always)]
pub(super) fn prefetch(start: *const u8, len: usize) {
    for line in (0..len).step_by(64) {
        isa::prefetch(start.wrapping_add(line));
    }
}

/// Multiplies expanded codes of `BITS` bits by codes of activations whose low byte has `LOW_BITS`
/// bits.
pub(crate) struct Tile<const BITS: u32, const LOW_BITS: u32, const PARTS: usize, const MIN: bool>;

impl<const BITS: u32, const LOW_BITS: u32, const PARTS: usize, const MIN: bool> PanelKernel
    for Tile<BITS, LOW_BITS, PARTS, MIN>
{
    const TUNED: bool = true;

    #[inline(always)]
    unsafe fn run<S: CodedSimd, const R: usize>(args: &Args<'_>) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut acc = load_acc::<S, R>(args.acc);
            let mut rows = args.rows;
            let next_bytes = args.constants.segment_bytes;
            for segment in 0..args.segments {
                if !args.next.is_null() {
                    prefetch(args.next.wrapping_add(segment * next_bytes), next_bytes);
                }
                let p = args.weights.add(segment * expanded_bytes::<S>());
                let scales = args.scales.add(segment * PARTS * PANEL);
                let mins = args.mins.add(segment * PANEL);
                let widths = [BITS, LOW_BITS];
                S::Codes::add_expanded::<R, PARTS, MIN>(widths, p, scales, mins, &rows, &mut acc);
                rows = rows.after::<CODE_BYTES>(1, PARTS);
            }
            store_acc::<S, R>(args.acc, acc);
        }
    }
}

/// Floats of 8, 16 or 32 bits, loaded as `f32`.
pub(crate) trait Float: 'static {
    /// Bytes of two positions of sixteen lanes.
    const PAIR_BYTES: usize;
    /// Positions `k` and `k + 1`.
    unsafe fn pair<S: Simd>(p: *const u8) -> (S::F, S::F);
}

/// `f32` weights, or weights that were expanded to `f32`.
pub(crate) struct Single;

impl Float for Single {
    const PAIR_BYTES: usize = 128;
    #[inline(always)]
    unsafe fn pair<S: Simd>(p: *const u8) -> (S::F, S::F) {
        // SAFETY: the caller gives 128 readable bytes.
        unsafe { (S::load(p.cast()), S::load(p.add(64).cast())) }
    }
}

/// `f16` weights.
pub(crate) struct HalfFloat;

impl Float for HalfFloat {
    const PAIR_BYTES: usize = 64;
    #[inline(always)]
    unsafe fn pair<S: Simd>(p: *const u8) -> (S::F, S::F) {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { (S::load_f16(p.cast()), S::load_f16(p.add(32).cast())) }
    }
}

/// `bf16` weights. A word holds two neighbours along k.
pub(crate) struct Brain;

impl Float for Brain {
    const PAIR_BYTES: usize = 64;
    #[inline(always)]
    unsafe fn pair<S: Simd>(p: *const u8) -> (S::F, S::F) {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe {
            let pair = S::load_i(p.cast());
            (S::bits_to_f(S::shl::<16>(pair)), S::bits_to_f(S::and(pair, 0xffff_0000)))
        }
    }
}

/// fp8 e4m3 weights.
pub(crate) struct Float8E4m3;

impl Float for Float8E4m3 {
    const PAIR_BYTES: usize = 32;
    #[inline(always)]
    unsafe fn pair<S: Simd>(p: *const u8) -> (S::F, S::F) {
        // SAFETY: the caller gives 32 readable bytes.
        unsafe { (S::load_e4m3(p), S::load_e4m3(p.add(16))) }
    }
}

/// fp8 e5m2 weights.
pub(crate) struct Float8E5m2;

impl Float for Float8E5m2 {
    const PAIR_BYTES: usize = 32;
    #[inline(always)]
    unsafe fn pair<S: Simd>(p: *const u8) -> (S::F, S::F) {
        // SAFETY: the caller gives 32 readable bytes.
        unsafe { (S::load_e5m2(p), S::load_e5m2(p.add(16))) }
    }
}

/// As [`Direct`], for float weights.
pub(crate) struct DirectFloats<W, const P: usize>(PhantomData<W>);

impl<W: Float, const P: usize> PanelKernel for DirectFloats<W, P> {
    const TUNED: bool = true;

    #[inline(always)]
    unsafe fn run<S: CodedSimd, const R: usize>(args: &Args<'_>) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut acc = [[S::splat(0.0); R]; P];
            unroll!(p in P => {
                acc[p] = load_acc::<S, R>(args.acc.add(p * PRODUCT));
            });
            let mut x = args.rows.x.cast::<f32>();
            let mut panel = args.weights;
            for _ in 0..args.segments {
                let ahead = ahead(panel.offset_from_unsigned(args.weights), P, args.panel_bytes);
                for k in 0..SEGMENT / 2 {
                    unroll!(p in P => {
                        let packed = panel.add(p * args.panel_bytes);
                        prefetch(packed.wrapping_add(ahead), W::PAIR_BYTES);
                        let (even, odd) = W::pair::<S>(packed);
                        unroll!(r in R => {
                            let x = x.add(SEGMENT * r + 2 * k);
                            acc[p][r] = S::fma(even, S::splat(*x), acc[p][r]);
                            acc[p][r] = S::fma(odd, S::splat(*x.add(1)), acc[p][r]);
                        });
                    });
                    panel = panel.add(W::PAIR_BYTES);
                }
                x = x.add(SEGMENT * args.rows.stride);
            }
            unroll!(p in P => {
                store_acc::<S, R>(args.acc.add(p * PRODUCT), acc[p]);
            });
        }
    }
}

/// As [`DirectFloats`], for fp8 under the scales of [`Group`].
pub(crate) struct DirectScaled<W, const P: usize>(PhantomData<W>);

impl<W: Float, const P: usize> PanelKernel for DirectScaled<W, P> {
    const TUNED: bool = true;

    #[inline(always)]
    unsafe fn run<S: CodedSimd, const R: usize>(args: &Args<'_>) {
        // SAFETY: as the caller promises.
        unsafe {
            let constants = args.constants;
            let in_chunk = constants.group_segments;
            let mut acc = [[S::splat(0.0); R]; P];
            unroll!(p in P => {
                acc[p] = load_acc::<S, R>(args.acc.add(p * PRODUCT));
            });
            let mut x = args.rows.x.cast::<f32>();
            let mut panel = args.weights;
            for _ in 0..args.segments / in_chunk {
                let mut scale = [S::splat(0.0); P];
                unroll!(p in P => {
                    let packed = panel.add(p * args.panel_bytes);
                    let tail = packed.add(in_chunk * (SEGMENT / 2) * W::PAIR_BYTES);
                    scale[p] = group_scale::<S>(tail, constants.scale);
                });
                for _ in 0..in_chunk {
                    let ahead =
                        ahead(panel.offset_from_unsigned(args.weights), P, args.panel_bytes);
                    for k in 0..SEGMENT / 2 {
                        unroll!(p in P => {
                            let packed = panel.add(p * args.panel_bytes);
                            prefetch(packed.wrapping_add(ahead), W::PAIR_BYTES);
                            let (even, odd) = W::pair::<S>(packed);
                            let (even, odd) = (S::mul(even, scale[p]), S::mul(odd, scale[p]));
                            unroll!(r in R => {
                                let x = x.add(SEGMENT * r + 2 * k);
                                acc[p][r] = S::fma(even, S::splat(*x), acc[p][r]);
                                acc[p][r] = S::fma(odd, S::splat(*x.add(1)), acc[p][r]);
                            });
                        });
                        panel = panel.add(W::PAIR_BYTES);
                    }
                    x = x.add(SEGMENT * args.rows.stride);
                }
                panel = panel.add(Group::<false>::tail_bytes(constants));
            }
            unroll!(p in P => {
                store_acc::<S, R>(args.acc.add(p * PRODUCT), acc[p]);
            });
        }
    }
}

/// Float weights times `f32` activations.
pub(crate) struct Widened<W>(PhantomData<W>);

impl<W: Float> PanelKernel for Widened<W> {
    const TUNED: bool = false;

    #[inline(always)]
    unsafe fn run<S: CodedSimd, const R: usize>(args: &Args<'_>) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut acc = load_acc::<S, R>(args.acc);
            let mut x = args.rows.x.cast::<f32>();
            let mut p = args.weights;
            for _ in 0..args.segments {
                for k in 0..SEGMENT / 2 {
                    let (even, odd) = W::pair::<S>(p);
                    unroll!(r in R => {
                        let x = x.add(SEGMENT * r + 2 * k);
                        acc[r] = S::fma(even, S::splat(*x), acc[r]);
                        acc[r] = S::fma(odd, S::splat(*x.add(1)), acc[r]);
                    });
                    p = p.add(W::PAIR_BYTES);
                }
                x = x.add(SEGMENT * args.rows.stride);
            }
            store_acc::<S, R>(args.acc, acc);
        }
    }
}
