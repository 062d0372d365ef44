//! The arithmetic of one panel against up to sixteen rows, generic over ISA and format.
//!
//! Each output is one lane of one accumulator, added to in the order of k:
//! ```text
//! coded: acc = fma(dw * dx, f32(-zero * sum(qx) + sum(qw * qx)), acc)   a segment (or half) at a time
//!        acc = fma(min, dx * sum(qx), acc)                             formats with a min
//! float: acc = fma(w, x, acc)                                          a position at a time
//! bf16 : acc = the machine's dot of two bf16 pairs                     two positions at a time
//! ```
//! The integer dot is exact, so any ISA may compute it in any order. The number of rows (`R`)
//! changes which accumulators exist, never what is added to one of them.

use std::marker::PhantomData;

use crate::isa::Simd;
use crate::pack::PANEL;

/// One panel against `R` rows of one block.
#[derive(Clone, Copy)]
pub(crate) struct PanelArgs {
    pub(crate) panel: *const u8,
    pub(crate) chunks: usize,
    pub(crate) rows: super::activations::BlockView,
    /// `[R][16]`.
    pub(crate) out: *mut f32,
}

/// Repeats a block with a constant `$r` from 0 to `$n - 1`, without a loop: arrays indexed by it
/// live in registers.
macro_rules! unroll {
    ($r:ident in $n:expr => $body:block) => {
        unroll!(@ $r, $n, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $r:ident, $n:expr, $body:block, $($i:literal)*) => {
        $( if $i < $n { let $r: usize = $i; $body } )*
    };
}

/// Segment by segment decoding of a coded chunk.
pub(crate) trait Coded: 'static {
    /// Segments of 32 positions in a chunk.
    const SEGMENTS: usize;
    /// Bytes of a segment's codes.
    const CODE_BYTES: usize;
    /// Bytes of a chunk.
    const CHUNK_BYTES: usize;
    /// Bits of a code.
    const BITS: u32;
    /// Scales of a segment: 1 or 2.
    const PARTS: usize;
    /// Whether a min is added.
    const MIN: bool;
    /// What the codes are shifted by.
    const ZERO: i32;

    /// The codes of a segment.
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8];
    /// The scales `[SEGMENTS][PARTS]` and mins `[SEGMENTS]` of a chunk.
    unsafe fn scales<S: Simd>(tail: *const u8) -> Scales<S>;
}

/// Scales and mins of a chunk, decoded.
pub(crate) struct Scales<S: Simd> {
    pub(crate) scales: [S::F; 16],
    pub(crate) mins: [S::F; 8],
}

#[inline(always)]
unsafe fn nibbles<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 256 readable bytes.
    unsafe {
        let (a, b) = (S::load_b(p), S::load_b(p.add(64)));
        let (c, d) = (S::load_b(p.add(128)), S::load_b(p.add(192)));
        [
            S::low4(a),
            S::high4(a),
            S::low4(b),
            S::high4(b),
            S::low4(c),
            S::high4(c),
            S::low4(d),
            S::high4(d),
        ]
    }
}

#[inline(always)]
unsafe fn five_bits<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 320 readable bytes.
    unsafe {
        let n = nibbles::<S>(p);
        let high = S::load_b(p.add(256));
        [
            S::merge::<4, 0, 0x10>(n[0], high),
            S::merge::<3, 0, 0x10>(n[1], high),
            S::merge::<2, 0, 0x10>(n[2], high),
            S::merge::<1, 0, 0x10>(n[3], high),
            S::merge::<0, 0, 0x10>(n[4], high),
            S::merge::<0, 1, 0x10>(n[5], high),
            S::merge::<0, 2, 0x10>(n[6], high),
            S::merge::<0, 3, 0x10>(n[7], high),
        ]
    }
}

#[inline(always)]
unsafe fn six_bits<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 384 readable bytes.
    unsafe {
        let n = nibbles::<S>(p);
        let (a, b) = (S::load_b(p.add(256)), S::load_b(p.add(320)));
        [
            S::merge::<4, 0, 0x30>(n[0], a),
            S::merge::<2, 0, 0x30>(n[1], a),
            S::merge::<0, 0, 0x30>(n[2], a),
            S::merge::<0, 2, 0x30>(n[3], a),
            S::merge::<4, 0, 0x30>(n[4], b),
            S::merge::<2, 0, 0x30>(n[5], b),
            S::merge::<0, 0, 0x30>(n[6], b),
            S::merge::<0, 2, 0x30>(n[7], b),
        ]
    }
}

#[inline(always)]
unsafe fn eight_bits<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 512 readable bytes.
    unsafe {
        [
            S::load_b(p),
            S::load_b(p.add(64)),
            S::load_b(p.add(128)),
            S::load_b(p.add(192)),
            S::load_b(p.add(256)),
            S::load_b(p.add(320)),
            S::load_b(p.add(384)),
            S::load_b(p.add(448)),
        ]
    }
}

/// The codes of a segment with `BITS` bits each.
#[inline(always)]
unsafe fn codes_of<S: Simd, const BITS: u32>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives a segment of this width.
    unsafe {
        match BITS {
            4 => nibbles::<S>(p),
            5 => five_bits::<S>(p),
            6 => six_bits::<S>(p),
            _ => eight_bits::<S>(p),
        }
    }
}

/// One segment a chunk with an `f16` scale and perhaps an `f16` min: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
pub(crate) struct Simple<const BITS: u32, const ZERO: i32, const MIN: bool>;

impl<const BITS: u32, const ZERO: i32, const MIN: bool> Coded for Simple<BITS, ZERO, MIN> {
    const SEGMENTS: usize = 1;
    const CODE_BYTES: usize = BITS as usize * 64;
    const CHUNK_BYTES: usize = Self::CODE_BYTES + 32 + if MIN { 32 } else { 0 };
    const BITS: u32 = BITS;
    const PARTS: usize = 1;
    const MIN: bool = MIN;
    const ZERO: i32 = ZERO;

    #[inline(always)]
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8] {
        // SAFETY: the caller gives a segment of this layout.
        unsafe { codes_of::<S, BITS>(segment) }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8) -> Scales<S> {
        // SAFETY: the caller gives the end of a chunk of this layout.
        unsafe {
            let mut all = Scales { scales: [S::splat(0.0); 16], mins: [S::splat(0.0); 8] };
            all.scales[0] = S::load_f16(tail.cast());
            if MIN {
                all.mins[0] = S::load_f16(tail.add(32).cast());
            }
            all
        }
    }
}

/// Eight segments a chunk with six-bit sub-scales and mins: Q4_K, Q5_K.
pub(crate) struct SuperMin<const BITS: u32>;

impl<const BITS: u32> Coded for SuperMin<BITS> {
    const SEGMENTS: usize = 8;
    const CODE_BYTES: usize = BITS as usize * 64;
    const CHUNK_BYTES: usize = 8 * Self::CODE_BYTES + 256;
    const BITS: u32 = BITS;
    const PARTS: usize = 1;
    const MIN: bool = true;
    const ZERO: i32 = 0;

    #[inline(always)]
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8] {
        // SAFETY: the caller gives a segment of this layout.
        unsafe { codes_of::<S, BITS>(segment) }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8) -> Scales<S> {
        // SAFETY: the caller gives the end of a chunk of this layout.
        unsafe {
            let w0 = S::load_i(tail.cast());
            let w1 = S::load_i(tail.add(64).cast());
            let w2 = S::load_i(tail.add(128).cast());
            let top = |w| S::shr::<24>(w);
            let w3 = S::or(S::or(top(w0), S::shl::<8>(top(w1))), S::shl::<16>(top(w2)));
            let d = S::load_f16(tail.add(192).cast());
            // The product of an f16 and six bits is exact in f32; so is its negative.
            let minus_dmin = S::mul(S::splat(-1.0), S::load_f16(tail.add(224).cast()));
            let [s0, s1, s2, s3] = four_sixes::<S>(w0, d);
            let [s4, s5, s6, s7] = four_sixes::<S>(w1, d);
            let [m0, m1, m2, m3] = four_sixes::<S>(w2, minus_dmin);
            let [m4, m5, m6, m7] = four_sixes::<S>(w3, minus_dmin);
            let zero = S::splat(0.0);
            Scales {
                scales: [
                    s0, s1, s2, s3, s4, s5, s6, s7, zero, zero, zero, zero, zero, zero, zero, zero,
                ],
                mins: [m0, m1, m2, m3, m4, m5, m6, m7],
            }
        }
    }
}

/// The four lowest six-bit numbers of a word, times `d`.
#[inline(always)]
unsafe fn four_sixes<S: Simd>(w: S::I, d: S::F) -> [S::F; 4] {
    // SAFETY: register arithmetic of the caller's ISA.
    unsafe {
        let six = |w| S::mul(S::to_f(S::and(w, 63)), d);
        [six(w), six(S::shr::<6>(w)), six(S::shr::<12>(w)), six(S::shr::<18>(w))]
    }
}

/// Sixteen signed sub-scales a chunk, one per 16 positions: Q6_K.
pub(crate) struct SuperSigned;

impl Coded for SuperSigned {
    const SEGMENTS: usize = 8;
    const CODE_BYTES: usize = 384;
    const CHUNK_BYTES: usize = 8 * 384 + 256 + 32;
    const BITS: u32 = 6;
    const PARTS: usize = 2;
    const MIN: bool = false;
    const ZERO: i32 = 32;

    #[inline(always)]
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8] {
        // SAFETY: the caller gives a segment of this layout.
        unsafe { six_bits::<S>(segment) }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8) -> Scales<S> {
        // SAFETY: the caller gives the end of a chunk of this layout.
        unsafe {
            let d = S::load_f16(tail.add(256).cast());
            let mut all = Scales { scales: [d; 16], mins: [d; 8] };
            unroll!(i in 16 => {
                all.scales[i] = S::mul(S::to_f(S::load_i8(tail.add(16 * i).cast())), d);
            });
            all
        }
    }
}

/// What a kernel does with a panel: one of the types below, for one format.
pub(crate) trait Kernel: 'static {
    /// Whether it is worth an instance for every number of rows.
    const TUNED: bool;
    /// # Safety
    /// `S` runs here; `args` covers `chunks` chunks of this kernel's layout and as many segments
    /// of `R` rows of its operand; `out` has room.
    unsafe fn run<S: Simd, const R: usize>(args: &PanelArgs);
}

/// Integer dots of coded weights and int8 activations.
pub(crate) struct Integer<C>(PhantomData<C>);

impl<C: Coded> Kernel for Integer<C> {
    const TUNED: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(args: &PanelArgs) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut acc = [S::splat(0.0); R];
            let mut rows = args.rows;
            let mut panel = args.panel;
            for _ in 0..args.chunks {
                let all = C::scales::<S>(panel.add(C::SEGMENTS * C::CODE_BYTES));
                let scales: *const S::F = all.scales.as_ptr();
                for segment in 0..C::SEGMENTS {
                    let codes = C::codes::<S>(panel.add(segment * C::CODE_BYTES));
                    if C::PARTS == 1 {
                        let scale =
                            if C::SEGMENTS == 1 { all.scales[0] } else { *scales.add(segment) };
                        unroll!(r in R => {
                            let start = if C::ZERO == 0 { 0 } else { *rows.offsets.add(r) };
                            let dot = S::dot::<8>(C::BITS, start, &codes, rows.x.add(32 * r).cast());
                            let factor = S::mul(scale, S::splat(*rows.scales.add(r)));
                            acc[r] = S::fma(factor, S::to_f(dot), acc[r]);
                        });
                    } else {
                        let low = [codes[0], codes[1], codes[2], codes[3]];
                        let high = [codes[4], codes[5], codes[6], codes[7]];
                        let (first, second) =
                            (*scales.add(2 * segment), *scales.add(2 * segment + 1));
                        unroll!(r in R => {
                            let dx = S::splat(*rows.scales.add(r));
                            let x = rows.x.add(32 * r).cast::<i8>();
                            let dot = S::dot::<4>(C::BITS, *rows.offsets.add(r), &low, x);
                            acc[r] = S::fma(S::mul(first, dx), S::to_f(dot), acc[r]);
                            let start = *rows.offsets.add(rows.stride + r);
                            let dot = S::dot::<4>(C::BITS, start, &high, x.add(16));
                            acc[r] = S::fma(S::mul(second, dx), S::to_f(dot), acc[r]);
                        });
                    }
                    if C::MIN {
                        let min = if C::SEGMENTS == 1 {
                            all.mins[0]
                        } else {
                            *all.mins.as_ptr().add(segment)
                        };
                        unroll!(r in R => {
                            acc[r] = S::fma(min, S::splat(*rows.sums.add(r)), acc[r]);
                        });
                    }
                    rows.x = rows.x.add(32 * rows.stride);
                    rows.scales = rows.scales.add(rows.stride);
                    rows.sums = rows.sums.wrapping_add(rows.stride);
                    rows.offsets = rows.offsets.wrapping_add(C::PARTS * rows.stride);
                }
                panel = panel.add(C::CHUNK_BYTES);
            }
            unroll!(r in R => {
                S::store(args.out.add(r * PANEL), acc[r]);
            });
        }
    }
}

/// Coded weights widened to `f32` a segment at a time, times `f32` activations.
pub(crate) struct Exact<C>(PhantomData<C>);

impl<C: Coded> Kernel for Exact<C> {
    const TUNED: bool = false;

    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(args: &PanelArgs) {
        // SAFETY: as the caller promises; `tile` is 32 vectors long.
        unsafe {
            let mut acc = [S::splat(0.0); R];
            let mut x = args.rows.x.cast::<f32>();
            let mut panel = args.panel;
            let mut tile = [0f32; 32 * PANEL];
            for _ in 0..args.chunks {
                let all = C::scales::<S>(panel.add(C::SEGMENTS * C::CODE_BYTES));
                for segment in 0..C::SEGMENTS {
                    widen::<S, C>(panel.add(segment * C::CODE_BYTES), &all, segment, &mut tile);
                    for half in 0..2 {
                        let w = tile.as_ptr().add(half * 16 * PANEL);
                        for k in 0..16 {
                            let w = S::load(w.add(k * PANEL));
                            unroll!(r in R => {
                                acc[r] = S::fma(w, S::splat(*x.add(16 * r + k)), acc[r]);
                            });
                        }
                        x = x.add(16 * args.rows.stride);
                    }
                }
                panel = panel.add(C::CHUNK_BYTES);
            }
            unroll!(r in R => {
                S::store(args.out.add(r * PANEL), acc[r]);
            });
        }
    }
}

/// The weights of a segment as `f32`, `[32][16]`.
#[inline(always)]
unsafe fn widen<S: Simd, C: Coded>(
    codes: *const u8,
    all: &Scales<S>,
    segment: usize,
    tile: &mut [f32; 32 * PANEL],
) {
    // SAFETY: the caller gives a segment of this layout.
    unsafe {
        let codes = C::codes::<S>(codes);
        let zero = S::splat(-C::ZERO as f32);
        let min = if C::MIN { all.mins[segment] } else { S::splat(0.0) };
        unroll!(j in 8 => {
            let scale = all.scales[segment * C::PARTS + j * C::PARTS / 8];
            let words = S::b_to_i(codes[j]);
            let value = |byte| S::fma(S::add(S::to_f(S::and(byte, 255)), zero), scale, min);
            let out = tile.as_mut_ptr().add(4 * j * PANEL);
            S::store(out, value(words));
            S::store(out.add(PANEL), value(S::shr::<8>(words)));
            S::store(out.add(2 * PANEL), value(S::shr::<16>(words)));
            S::store(out.add(3 * PANEL), value(S::shr::<24>(words)));
        });
    }
}

/// `f32` weights times `f32` activations.
pub(crate) struct F32Kernel;

impl Kernel for F32Kernel {
    const TUNED: bool = false;

    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(args: &PanelArgs) {
        // SAFETY: as the caller promises.
        unsafe { float::<S, R, 64>(args, |p| S::load(p.cast())) }
    }
}

/// `f16` weights, widened, times `f32` activations.
pub(crate) struct F16Kernel;

impl Kernel for F16Kernel {
    const TUNED: bool = false;

    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(args: &PanelArgs) {
        // SAFETY: as the caller promises.
        unsafe { float::<S, R, 32>(args, |p| S::load_f16(p.cast())) }
    }
}

/// A chunk of 16 positions, `BYTES` a vector, through `load`.
#[inline(always)]
unsafe fn float<S: Simd, const R: usize, const BYTES: usize>(
    args: &PanelArgs,
    load: impl Fn(*const u8) -> S::F,
) {
    // SAFETY: the caller gives `chunks` chunks of this layout.
    unsafe {
        let mut acc = [S::splat(0.0); R];
        let mut x = args.rows.x.cast::<f32>();
        let mut panel = args.panel;
        for _ in 0..args.chunks {
            for k in 0..16 {
                let w = load(panel.add(k * BYTES));
                unroll!(r in R => {
                    acc[r] = S::fma(w, S::splat(*x.add(16 * r + k)), acc[r]);
                });
            }
            x = x.add(16 * args.rows.stride);
            panel = panel.add(16 * BYTES);
        }
        unroll!(r in R => {
            S::store(args.out.add(r * PANEL), acc[r]);
        });
    }
}

/// `bf16` weights, widened, times `f32` activations.
pub(crate) struct Bf16Widened;

impl Kernel for Bf16Widened {
    const TUNED: bool = false;

    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(args: &PanelArgs) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut acc = [S::splat(0.0); R];
            let mut x = args.rows.x.cast::<f32>();
            let mut panel = args.panel;
            for _ in 0..2 * args.chunks {
                for k in 0..8 {
                    let pair = S::load_i(panel.add(64 * k).cast());
                    let even = S::bits_to_f(S::shl::<16>(pair));
                    let odd = S::bits_to_f(S::and(pair, 0xffff_0000));
                    unroll!(r in R => {
                        acc[r] = S::fma(even, S::splat(*x.add(16 * r + 2 * k)), acc[r]);
                        acc[r] = S::fma(odd, S::splat(*x.add(16 * r + 2 * k + 1)), acc[r]);
                    });
                }
                x = x.add(16 * args.rows.stride);
                panel = panel.add(8 * 64);
            }
            unroll!(r in R => {
                S::store(args.out.add(r * PANEL), acc[r]);
            });
        }
    }
}

/// `bf16` weights times `bf16` activations, by the ISA's instruction.
pub(crate) struct Bf16Pairs;

impl Kernel for Bf16Pairs {
    const TUNED: bool = true;

    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(args: &PanelArgs) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut acc = [S::splat(0.0); R];
            let mut x = args.rows.x.cast::<u32>();
            let mut panel = args.panel;
            for _ in 0..args.chunks {
                for k in 0..16 {
                    let w = S::load_b(panel.add(64 * k));
                    unroll!(r in R => {
                        acc[r] = S::dot_bf16(acc[r], w, x.add(16 * r + k));
                    });
                }
                x = x.add(16 * args.rows.stride);
                panel = panel.add(16 * 64);
            }
            unroll!(r in R => {
                S::store(args.out.add(r * PANEL), acc[r]);
            });
        }
    }
}
