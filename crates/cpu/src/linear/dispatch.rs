//! From a matrix's layout, operand and ISA to its kernels.

use std::marker::PhantomData;

use lathe_tensor::FloatType;

#[cfg(target_arch = "x86_64")]
use super::amx::decode;
use super::codes::*;
use super::kernels::*;
#[cfg(target_arch = "x86_64")]
use super::prompt::weights;
use super::table::{Args, ChooseFn, ExpandFn, Kernels, RunFn, Scratch, Tiles};
#[cfg(target_arch = "x86_64")]
use super::table::{BatchFn, Prompt, TileInstructions, ToTilesFn};
use crate::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::features::with_features;
#[cfg(target_arch = "aarch64")]
use crate::isa::neon::Neon;
use crate::isa::portable::Portable;
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2::Avx2, avx512::Avx512};
use crate::pack::layout::{Codes, Constants, Fineness, Operand, PanelLayout, Scales};

/// A set of features that kernels are compiled for.
trait Target {
    /// The most rows whose sums fit its registers: 4 or 16.
    const ROWS_MAX: usize;
    /// Whether its integer dot is the same for codes of every width.
    const ANY_WIDTH: bool;
    /// The most rows that direct kernels multiply. For more rows it is faster to decode once for
    /// all of them. With few registers that limit is lower.
    const DIRECT_ROWS: usize;
    /// Whether its coded activations are words.
    const WORDS: bool;
    fn run<K: PanelKernel, const R: usize>() -> RunFn;
    fn expand<E: Expand>() -> ExpandFn;
}

struct PortableTarget;

impl Target for PortableTarget {
    const ROWS_MAX: usize = 4;
    const ANY_WIDTH: bool = true;
    const DIRECT_ROWS: usize = 0;
    const WORDS: bool = words::<Portable>();
    fn run<K: PanelKernel, const R: usize>() -> RunFn {
        unsafe fn run<K: PanelKernel, const R: usize>(args: &Args<'_>) {
            // SAFETY: as `PanelKernel::run`; plain Rust runs everywhere.
            unsafe { K::run::<Portable, R>(args) }
        }
        run::<K, R>
    }
    fn expand<E: Expand>() -> ExpandFn {
        unsafe fn run<E: Expand>(p: *const u8, n: usize, c: &Constants, out: &mut Scratch) {
            // SAFETY: as `Expand::expand`; plain Rust runs everywhere.
            unsafe { E::expand::<Portable>(p, n, c, out) }
        }
        run::<E>
    }
}

/// A target whose kernels are compiled with `$features`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! target {
    ($name:ident, $simd:ty, $rows:literal, $any_width:literal, $features:ident) => {
        struct $name;

        impl Target for $name {
            const ROWS_MAX: usize = $rows;
            const ANY_WIDTH: bool = $any_width;
            const DIRECT_ROWS: usize = if $rows > 4 { 16 } else { 4 };
            const WORDS: bool = words::<$simd>();
            fn run<K: PanelKernel, const R: usize>() -> RunFn {
                with_features! { $features =>
                    unsafe fn run<K: PanelKernel, const R: usize>(args: &Args<'_>) {
                        // SAFETY: as `PanelKernel::run`.
                        unsafe { K::run::<$simd, R>(args) }
                    }
                }
                run::<K, R>
            }
            fn expand<E: Expand>() -> ExpandFn {
                with_features! { $features =>
                    unsafe fn run<E: Expand>(
                        panel: *const u8,
                        segments: usize,
                        constants: &Constants,
                        out: &mut Scratch,
                    ) {
                        // SAFETY: as `Expand::expand`.
                        unsafe { E::expand::<$simd>(panel, segments, constants, out) }
                    }
                }
                run::<E>
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
target!(Avx2Target, Avx2<false>, 4, true, avx2);
#[cfg(target_arch = "x86_64")]
target!(AvxVnniTarget, Avx2<true>, 4, true, avx_vnni);
#[cfg(target_arch = "x86_64")]
target!(Avx512Target, Avx512, 16, true, avx512);
#[cfg(target_arch = "aarch64")]
target!(NeonTarget, Neon<false>, 4, false, neon);
#[cfg(target_arch = "aarch64")]
target!(NeonDotTarget, Neon<true>, 4, false, neon_dot);

/// The kernels of a matrix. `None` if no kernel reads its codes under its scales.
pub(crate) fn kernels(isa: Isa, layout: PanelLayout, operand: Operand) -> Option<Kernels> {
    Some(match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => {
            let kernels = for_target::<Avx512Target>(layout, operand)?;
            let prompt = match (layout, operand) {
                (PanelLayout::Coded(codes, scales), Operand::Int8(_)) => {
                    let to_tiles = Some(with_coded(codes, scales, OnTiles)?);
                    Some(Prompt { to_tiles, products: TileInstructions::Amx })
                }
                // Integer codes whose operand is `f32` have no prefill form. The operand of fp8
                // codes is always `f32`, and they have one.
                _ => prompt_of_floats(layout, TileInstructions::Amx),
            };
            let tiles = match layout {
                PanelLayout::Float(FloatType::BF16) => Tiles::Split,
                _ => nibbles(layout, operand).map_or(Tiles::None, Tiles::Codes),
            };
            Kernels { prompt, tiles, ..kernels }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            let kernels = for_target::<Avx512Target>(layout, operand)?;
            // Two dots of bytes are as fast as one of pairs, and exact. So integer codes have no
            // prefill form here.
            if isa.prefers_bf16_dot() { with_dots(kernels, layout) } else { kernels }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni if matches!(operand, Operand::Int8(_)) => {
            for_target::<AvxVnniTarget>(layout, operand)?
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => for_target::<Avx2Target>(layout, operand)?,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot if matches!(operand, Operand::Int8(_)) => {
            for_target::<NeonDotTarget>(layout, operand)?
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot => for_target::<NeonTarget>(layout, operand)?,
        _ => for_target::<PortableTarget>(layout, operand)?,
    })
}

/// `kernels`, but rows in the prefill form are multiplied by AVX-512's `bf16` dots if the weights
/// are `bf16` or fp8.
#[cfg(target_arch = "x86_64")]
pub(super) fn with_dots(kernels: Kernels, layout: PanelLayout) -> Kernels {
    Kernels { prompt: prompt_of_floats(layout, TileInstructions::Dots), ..kernels }
}

/// The products of `bf16` and fp8 weights with rows in the prefill form.
#[cfg(target_arch = "x86_64")]
fn prompt_of_floats(layout: PanelLayout, products: TileInstructions) -> Option<Prompt> {
    let to_tiles: Option<ToTilesFn> = match layout {
        PanelLayout::Float(FloatType::BF16) => None,
        PanelLayout::Coded(Codes::F8E4m3, _) => Some(weights::to_tiles_of_floats::<Float8E4m3>),
        PanelLayout::Coded(Codes::F8E5m2, _) => Some(weights::to_tiles_of_floats::<Float8E5m2>),
        _ => return None,
    };
    Some(Prompt { to_tiles, products })
}

fn floats<T: Target, W: Float>() -> Kernels {
    Kernels {
        direct: if T::DIRECT_ROWS > 0 { Some(direct_floats_of::<T, W>) } else { None },
        direct_rows: T::DIRECT_ROWS,
        plain: Some(rows_of::<T, Widened<W>>),
        expand: Some(T::expand::<ToWide<W>>()),
        tile: rows_of::<T, Widened<Single>>,
        #[cfg(target_arch = "x86_64")]
        prompt: None,
        tiles: Tiles::None,
        words: T::WORDS,
    }
}

/// fp8 under the scales of [`Group`].
fn scaled_floats<T: Target, W: Float>() -> Kernels {
    Kernels {
        direct: if T::DIRECT_ROWS > 0 { Some(direct_scaled_of::<T, W>) } else { None },
        plain: None,
        expand: Some(T::expand::<ToScaledFloats<W>>()),
        tile: rows_of::<T, Widened<Single>>,
        ..floats::<T, W>()
    }
}

fn for_target<T: Target>(layout: PanelLayout, operand: Operand) -> Option<Kernels> {
    Some(match layout {
        PanelLayout::Float(FloatType::F32) => Kernels { expand: None, ..floats::<T, Single>() },
        PanelLayout::Float(FloatType::F16) => floats::<T, HalfFloat>(),
        PanelLayout::Float(FloatType::BF16) => floats::<T, Brain>(),
        PanelLayout::Coded(Codes::F8E4m3, _) => scaled_floats::<T, Float8E4m3>(),
        PanelLayout::Coded(Codes::F8E5m2, _) => scaled_floats::<T, Float8E5m2>(),
        PanelLayout::Coded(codes, scales) => {
            with_coded(codes, scales, OnTarget::<T>(operand, PhantomData))?
        }
    })
}

/// A function of the type of a coded format.
trait Visit {
    type Output;
    fn with<C: Coded>(self) -> Self::Output;
}

/// The kernels of a target.
struct OnTarget<T>(Operand, PhantomData<T>);

impl<T: Target> Visit for OnTarget<T> {
    type Output = Kernels;
    fn with<C: Coded>(self) -> Kernels {
        coded::<T, C>(self.0)
    }
}

/// The weights of tiles.
#[cfg(target_arch = "x86_64")]
struct OnTiles;

#[cfg(target_arch = "x86_64")]
impl Visit for OnTiles {
    type Output = ToTilesFn;
    fn with<C: Coded>(self) -> ToTilesFn {
        weights::to_tiles::<C>
    }
}

/// The kernel for batches of rows in the decoding form.
#[cfg(target_arch = "x86_64")]
fn nibbles(layout: PanelLayout, operand: Operand) -> Option<BatchFn> {
    let (PanelLayout::Coded(codes, scales), Operand::Int8(_)) = (layout, operand) else {
        return None;
    };
    let zeros = matches!(scales, Scales::Group { zeros: true, .. });
    Some(match (codes, scales) {
        (Codes::Signed4, Scales::Half) => decode::nibbles_of::<Pair<Plain<4, 8>, Half<false>>>,
        (Codes::Unsigned4, Scales::HalfMin) => decode::nibbles_of::<Pair<Plain<4, 0>, Half<true>>>,
        (Codes::Unsigned4, Scales::SuperMin) => decode::nibbles_of::<Pair<Plain<4, 0>, SuperMin>>,
        (Codes::Signed4, Scales::Group { .. }) if zeros => {
            decode::nibbles_of::<Pair<Plain<4, 8>, Group<true>>>
        }
        (Codes::Signed4, Scales::Group { .. }) => {
            decode::nibbles_of::<Pair<Plain<4, 8>, Group<false>>>
        }
        _ => return None,
    })
}

/// Calls `visit` with the type that stands for a pair of codes and scales, if there is one.
fn with_coded<V: Visit>(codes: Codes, scales: Scales, visit: V) -> Option<V::Output> {
    let zeros = matches!(scales, Scales::Group { zeros: true, .. });
    Some(match (codes, scales) {
        (Codes::Signed4, Scales::Half) => visit.with::<Pair<Plain<4, 8>, Half<false>>>(),
        (Codes::Unsigned4, Scales::HalfMin) => visit.with::<Pair<Plain<4, 0>, Half<true>>>(),
        (Codes::Signed5, Scales::Half) => visit.with::<Pair<Plain<5, 16>, Half<false>>>(),
        (Codes::Unsigned5, Scales::HalfMin) => visit.with::<Pair<Plain<5, 0>, Half<true>>>(),
        (Codes::Signed8, Scales::Half) => visit.with::<Pair<Plain<8, 128>, Half<false>>>(),
        (Codes::Unsigned4, Scales::SuperMin) => visit.with::<Pair<Plain<4, 0>, SuperMin>>(),
        (Codes::Unsigned5, Scales::SuperMin) => visit.with::<Pair<Plain<5, 0>, SuperMin>>(),
        (Codes::Signed6, Scales::SuperSigned) => visit.with::<Pair<Plain<6, 32>, SuperSigned>>(),
        (Codes::Iq4, Scales::Half) => visit.with::<Pair<Table<8>, Half<false>>>(),
        (Codes::Iq4, Scales::SuperSix) => visit.with::<Pair<Table<8>, SuperSix>>(),
        (Codes::E2m1, Scales::E8m0) => visit.with::<Pair<Table<5>, E8m0>>(),
        (Codes::E2m1, Scales::E4m3) => visit.with::<Pair<Table<5>, E4m3>>(),
        (Codes::Signed4, Scales::Group { .. }) if zeros => {
            visit.with::<Pair<Plain<4, 8>, Group<true>>>()
        }
        (Codes::Signed4, Scales::Group { .. }) => visit.with::<Pair<Plain<4, 8>, Group<false>>>(),
        (Codes::Signed8, Scales::Group { .. }) if zeros => {
            visit.with::<Pair<Plain<8, 128>, Group<true>>>()
        }
        (Codes::Signed8, Scales::Group { .. }) => visit.with::<Pair<Plain<8, 128>, Group<false>>>(),
        _ => return None,
    })
}

fn coded<T: Target, C: Coded>(operand: Operand) -> Kernels {
    match operand {
        Operand::Int8(_) => Kernels {
            direct: if T::DIRECT_ROWS > 0 { Some(direct_rows_of::<T, C>) } else { None },
            direct_rows: T::DIRECT_ROWS,
            plain: None,
            expand: Some(T::expand::<ToCodes<C>>()),
            tile: tile::<T>(C::BITS, C::PARTS, C::MIN),
            #[cfg(target_arch = "x86_64")]
            prompt: None,
            tiles: Tiles::None,
            words: T::WORDS,
        },
        _ => Kernels {
            direct: None,
            direct_rows: 0,
            plain: None,
            expand: Some(T::expand::<ToFloats<C>>()),
            tile: rows_of::<T, Widened<Single>>,
            #[cfg(target_arch = "x86_64")]
            prompt: None,
            tiles: Tiles::None,
            words: T::WORDS,
        },
    }
}

/// The kernel of expanded codes. Its type has the codes' width where a dot could saturate, and
/// where codes of four bits meet coarser activations. Elsewhere width 8 stands for every width.
fn tile<T: Target>(bits: u32, parts: usize, min: bool) -> ChooseFn {
    const FINE: u32 = Fineness::Fine.low_bits();
    const COARSE: u32 = Fineness::Coarse.low_bits();
    if T::WORDS || T::ANY_WIDTH {
        let coarse = bits == 4 && !T::WORDS;
        return match (coarse, parts, min) {
            (true, _, false) => rows_of::<T, Tile<4, COARSE, 1, false>>,
            (true, _, true) => rows_of::<T, Tile<4, COARSE, 1, true>>,
            (false, 1, false) => rows_of::<T, Tile<8, FINE, 1, false>>,
            (false, 1, true) => rows_of::<T, Tile<8, FINE, 1, true>>,
            (false, _, _) => rows_of::<T, Tile<8, FINE, 2, false>>,
        };
    }
    match (bits, parts, min) {
        (8, 1, false) => rows_of::<T, Tile<8, FINE, 1, false>>,
        (8, 1, true) => rows_of::<T, Tile<8, FINE, 1, true>>,
        (8, _, _) => rows_of::<T, Tile<8, FINE, 2, false>>,
        (4, _, false) => rows_of::<T, Tile<4, COARSE, 1, false>>,
        (4, _, true) => rows_of::<T, Tile<4, COARSE, 1, true>>,
        (5, 1, false) => rows_of::<T, Tile<5, FINE, 1, false>>,
        (5, 1, true) => rows_of::<T, Tile<5, FINE, 1, true>>,
        (5, _, _) => rows_of::<T, Tile<5, FINE, 2, false>>,
        (_, _, _) => rows_of::<T, Tile<6, FINE, 2, false>>,
    }
}

/// Chooses the instance of a kernel that multiplies several panels at once.
macro_rules! choose_direct {
    ($name:ident, $bound:ident, $kernel:ident) => {
        fn $name<T: Target, C: $bound>(rows: usize, panels: usize) -> (RunFn, usize, usize) {
            match (rows, panels) {
                (8.., _) if T::DIRECT_ROWS >= 8 => (T::run::<$kernel<C, 1>, 8>(), 8, 1),
                (4.., _) if T::DIRECT_ROWS >= 4 => (T::run::<$kernel<C, 1>, 4>(), 4, 1),
                (2.., 2..) => (T::run::<$kernel<C, 2>, 2>(), 2, 2),
                (2.., _) => (T::run::<$kernel<C, 1>, 2>(), 2, 1),
                (_, 4..) => (T::run::<$kernel<C, 4>, 1>(), 1, 4),
                _ => (T::run::<$kernel<C, 1>, 1>(), 1, 1),
            }
        }
    };
}

choose_direct!(direct_rows_of, Coded, Direct);
choose_direct!(direct_floats_of, Float, DirectFloats);
choose_direct!(direct_scaled_of, Float, DirectScaled);

/// The instance for the most rows that `left`, the registers and the kernel allow. Only tuned
/// kernels have instances for many numbers of rows, because each instance costs seconds of
/// building.
fn rows_of<T: Target, K: PanelKernel>(left: usize) -> (RunFn, usize) {
    match left.min(T::ROWS_MAX) {
        16.. if T::ROWS_MAX >= 16 => (T::run::<K, 16>(), 16),
        12.. if T::ROWS_MAX >= 16 && K::TUNED => (T::run::<K, 12>(), 12),
        8.. if T::ROWS_MAX >= 8 => (T::run::<K, 8>(), 8),
        6.. if T::ROWS_MAX >= 8 && K::TUNED => (T::run::<K, 6>(), 6),
        4.. => (T::run::<K, 4>(), 4),
        2.. if K::TUNED && T::DIRECT_ROWS > 0 => (T::run::<K, 2>(), 2),
        _ => (T::run::<K, 1>(), 1),
    }
}
