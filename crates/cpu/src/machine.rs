//! Measures what this machine can do: the roofs of the roofline model.
//!
//! [`measure_bandwidth`] reads a buffer much larger than the last-level cache, as decoding reads
//! weights. [`measure_matmul`] multiplies in registers, and no real product is faster. Both take
//! well under half a second and return the best of many short runs, because other work on the
//! machine only makes a run slower.

use std::hint::black_box;
use std::time::Instant;

use lathe_program::BackendError;

use crate::gang::{Gang, share};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::features::with_features;
#[cfg(target_arch = "aarch64")]
use crate::isa::neon::Neon;
use crate::isa::portable::Portable;
use crate::isa::{Isa, Simd};
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2::Avx2, avx512::Avx512, features};
use crate::pack::memory::AlignedBytes;

/// Memory bandwidth of some threads together, in 10^9 bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BandwidthReport {
    /// Bytes read, with plain loads of the widest vector.
    pub read_gb_s: f64,
    /// Bytes read plus bytes written by a copy.
    pub copy_gb_s: f64,
    /// Threads that took part.
    pub threads: usize,
    /// Bytes of the buffer.
    pub buffer_bytes: usize,
}

/// Rates of multiply-add in registers, each counted as two operations, in 10^9 a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatmulReport {
    /// The instructions measured.
    pub isa: Isa,
    /// Threads that took part.
    pub threads: usize,
    /// Products of int8 with sums in int32.
    pub int8_gop_s: f64,
    /// Products of bf16 with sums in f32. Where the instruction set has none, the rate of f32.
    pub bf16_gop_s: f64,
    /// Fused multiply-adds in f32.
    pub f32_gop_s: f64,
}

/// Passes over the buffer.
const PASSES: usize = 4;
/// Slices of the buffer that are timed separately. The best one counts. A slice takes about a
/// millisecond, so some are not interrupted even on a busy machine.
const SLICES: usize = 16;
/// The least size of the buffer.
const BUFFER_BYTES_MIN: usize = 192 << 20;
/// The largest size of the buffer.
const BUFFER_BYTES_MAX: usize = 1 << 30;

/// Bytes of the largest cache that the first core sees, if the system tells.
pub fn last_level_cache_bytes() -> Option<usize> {
    (0..8)
        .filter_map(|index| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
            let text = std::fs::read_to_string(path).ok()?;
            Some(text.trim().strip_suffix('K')?.parse::<usize>().ok()? << 10)
        })
        .max()
}

/// Measures how fast `threads` threads together read and copy main memory.
///
/// # Errors
/// [`BackendError::Memory`] if the buffer cannot be had.
pub fn measure_bandwidth(threads: usize) -> Result<BandwidthReport, BackendError> {
    let cache = last_level_cache_bytes().unwrap_or(32 << 20);
    let bytes = (4 * cache).clamp(BUFFER_BYTES_MIN, BUFFER_BYTES_MAX) & !4095;
    let mut buffer = AlignedBytes::zeroed("the bandwidth measurement", bytes)?;
    let gang = Gang::new(threads);
    let base = Shared(buffer.as_mut_ptr());
    gang.run(|worker, workers| {
        let range = share(bytes / 4096, worker, workers);
        // SAFETY: workers touch disjoint parts of the buffer.
        unsafe { base.get().add(range.start * 4096).write_bytes(1, range.len() * 4096) };
    });
    let slice_bytes = (bytes / SLICES) & !4095;
    let slice = |index: usize, worker, workers| {
        let range = share(slice_bytes / 4096, worker, workers);
        (index % SLICES * slice_bytes + range.start * 4096, range.len() * 4096)
    };
    let read = best_seconds(PASSES * SLICES, |index| {
        gang.run(|worker, workers| {
            let (from, len) = slice(index, worker, workers);
            // SAFETY: the part lies within the buffer, which nobody writes now.
            black_box(unsafe { read_all(base.get().add(from), len) });
        });
    });
    let copy = best_seconds(PASSES / 2 * SLICES, |index| {
        gang.run(|worker, workers| {
            let (from, len) = slice(index, worker, workers);
            // SAFETY: the halves of the part are disjoint, and no other worker's.
            unsafe {
                let start = base.get().add(from);
                start.add(len / 2).copy_from_nonoverlapping(start, len / 2);
            }
        });
    });
    Ok(BandwidthReport {
        read_gb_s: slice_bytes as f64 / read / 1e9,
        copy_gb_s: slice_bytes as f64 / copy / 1e9,
        threads: gang.workers(),
        buffer_bytes: bytes,
    })
}

/// Measures how fast `threads` threads together multiply and add with `isa`, without loads. This
/// machine must have `isa`.
pub fn measure_matmul(threads: usize, isa: Isa) -> MatmulReport {
    let gang = Gang::new(threads);
    let int8 = |steps| run_peak(isa, Number::Int8, steps);
    let float = |steps| run_peak(isa, Number::F32, steps);
    let float_rate = rate(&gang, 2 * 16, &float);
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx {
        // A step has four products of tiles, but `rate` counts `CHAINS` instructions.
        let product = 4 * 2 * 16 * 16 * 32 / CHAINS;
        // SAFETY: `isa` is available, so the caller promised.
        let tiles = |int8: bool| move |steps| unsafe { crate::linear::amx::peak(int8, steps) };
        return MatmulReport {
            isa,
            threads: gang.workers(),
            int8_gop_s: rate(&gang, 2 * product, &tiles(true)),
            bf16_gop_s: rate(&gang, product, &tiles(false)),
            f32_gop_s: float_rate,
        };
    }
    MatmulReport {
        isa,
        threads: gang.workers(),
        int8_gop_s: rate(&gang, 2 * 64, &int8),
        bf16_gop_s: bf16_rate(&gang, isa).unwrap_or(float_rate),
        f32_gop_s: float_rate,
    }
}

/// A pointer that workers share. Each uses a part of its own.
struct Shared(*mut u8);

// SAFETY: see the uses.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut u8 {
        self.0
    }
}

fn best_seconds(runs: usize, mut run: impl FnMut(usize)) -> f64 {
    let times = (0..runs).map(|index| {
        let start = Instant::now();
        run(index);
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Reads `len` bytes (a multiple of 256) and returns a number that depends on all of them.
unsafe fn read_all(start: *const u8, len: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if features::avx512() {
        // SAFETY: detected.
        return unsafe { read_all_avx512(start, len) };
    }
    let mut sums = [0u64; 32];
    for at in (0..len).step_by(256) {
        // SAFETY: the caller gives `len` readable bytes.
        let line = unsafe { start.add(at).cast::<[u64; 32]>().read_unaligned() };
        for (sum, value) in sums.iter_mut().zip(line) {
            *sum |= value;
        }
    }
    sums.iter().fold(0, |all, sum| all | sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn read_all_avx512(start: *const u8, len: usize) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 4];
    for at in (0..len).step_by(256) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller gives `len` readable bytes.
            let line = unsafe { _mm512_loadu_si512(start.add(at + 64 * i).cast()) };
            *sum = _mm512_or_si512(*sum, line);
        }
    }
    let [a, b, c, d] = sums;
    _mm512_reduce_or_epi64(_mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d))) as u64
}

#[derive(Clone, Copy)]
enum Number {
    Int8,
    F32,
}

/// The number of independent accumulators. It is more than latency times instructions a cycle on
/// any core so far.
const CHAINS: usize = 12;

/// The rate in 10^9 operations a second, if each of a step's `CHAINS` instructions does
/// `operations`.
fn rate(gang: &Gang, operations: usize, work: &(dyn Fn(usize) + Sync)) -> f64 {
    let mut steps = 1000;
    loop {
        let seconds = best_seconds(4, |_| gang.run(|_, _| work(steps)));
        if seconds > 2e-4 {
            let seconds = best_seconds(40, |_| gang.run(|_, _| work(steps))).min(seconds);
            let all = operations * CHAINS * steps * gang.workers();
            return all as f64 / seconds / 1e9;
        }
        steps *= 2;
    }
}

/// The rate of dots of `bf16` pairs, if `isa` has them.
fn bf16_rate(gang: &Gang, isa: Isa) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if isa.has_bf16_dot() {
        // SAFETY: the instructions were detected.
        return Some(rate(gang, 2 * 32, &|steps| unsafe { peak_avx512_bf16(steps) }));
    }
    let _ = (gang, isa);
    None
}

fn run_peak(isa: Isa, number: Number, steps: usize) {
    // SAFETY: `isa` is available, so the caller promised.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => peak_avx512(number, steps),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni if matches!(number, Number::Int8) => peak_avx_vnni(number, steps),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => peak_avx2(number, steps),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => peak::<Neon<false>>(number, steps),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => peak_neon_dot(number, steps),
            _ => peak::<Portable>(number, steps),
        }
    }
}

#[cfg(target_arch = "x86_64")]
with_features! { avx512 =>
    unsafe fn peak_avx512(number: Number, steps: usize) {
        // SAFETY: the features are enabled here.
        unsafe { peak::<Avx512>(number, steps) }
    }
}

#[cfg(target_arch = "x86_64")]
with_features! { avx512_bf16 =>
    unsafe fn peak_avx512_bf16(steps: usize) {
        let ones = black_box([1u32; 16]);
        // SAFETY: the features are enabled here, and `ones` has the 64 bytes of a vector.
        unsafe {
            let pairs = Avx512::load_b(ones.as_ptr().cast());
            let mut sums = [Avx512::splat(0.0); CHAINS];
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = Avx512::dot_bf16(*sum, pairs, ones.as_ptr());
                }
            }
            for sum in sums {
                let mut out = [0f32; 16];
                Avx512::store(out.as_mut_ptr(), sum);
                black_box(out);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
with_features! { avx2 =>
    unsafe fn peak_avx2(number: Number, steps: usize) {
        // SAFETY: the features are enabled here.
        unsafe { peak::<Avx2<false>>(number, steps) }
    }
}

#[cfg(target_arch = "x86_64")]
with_features! { avx_vnni =>
    unsafe fn peak_avx_vnni(number: Number, steps: usize) {
        // SAFETY: the features are enabled here.
        unsafe { peak::<Avx2<true>>(number, steps) }
    }
}

#[cfg(target_arch = "aarch64")]
with_features! { neon_dot =>
    unsafe fn peak_neon_dot(number: Number, steps: usize) {
        // SAFETY: the features are enabled here.
        unsafe { peak::<Neon<true>>(number, steps) }
    }
}

/// `steps` times `CHAINS` independent multiply-adds.
// Loops and not `map`: a closure that a library function calls is compiled without the features.
#[inline(always)]
unsafe fn peak<S: Simd>(number: Number, steps: usize) {
    let ones = black_box([1u32; 16]);
    // SAFETY: `ones` has the 64 bytes of a vector.
    unsafe {
        let (f, b) = (S::load(ones.as_ptr().cast()), S::load_b(ones.as_ptr().cast()));
        let mut floats = [S::splat(0.0); CHAINS];
        let mut ints = [S::load_i(ones.as_ptr()); CHAINS];
        for _ in 0..steps {
            match number {
                Number::Int8 => {
                    for acc in &mut ints {
                        *acc = S::dot_step(*acc, b, b);
                    }
                }
                Number::F32 => {
                    for acc in &mut floats {
                        *acc = S::fma(f, f, *acc);
                    }
                }
            }
        }
        for chain in 0..CHAINS {
            let both = S::add(floats[chain], S::to_f(ints[chain]));
            let mut out = [0f32; 16];
            S::store(out.as_mut_ptr(), both);
            black_box(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_numbers() {
        let bandwidth = measure_bandwidth(1).expect("memory for the buffer");
        assert!(bandwidth.read_gb_s > 0.0 && bandwidth.copy_gb_s > 0.0, "{bandwidth:?}");
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let rates = measure_matmul(1, isa);
            assert!(rates.int8_gop_s > 0.0 && rates.f32_gop_s > 0.0, "{rates:?}");
        }
    }
}
