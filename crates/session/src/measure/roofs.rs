//! The roofs of this machine, measured now. The cost of a step is compared with them.

use lathe_cpu::Isa;
use lathe_cpu::machine::{measure_bandwidth, measure_matmul};
use lathe_program::cost::{Cost, Roofline, roofline};
use lathe_tensor::{Element, Format};
use serde::Serialize;

use crate::error::SessionError;
use crate::measure::shape::Sizes;
use crate::options::{Device, Options};

/// Rates of this machine with some threads.
#[derive(Debug, Clone, Serialize)]
pub struct Roofs {
    /// Threads that ran at the same time.
    pub threads: usize,
    /// Read bandwidth of main memory.
    pub read_gb_s: f64,
    /// Copy bandwidth of main memory: bytes read plus bytes written.
    pub copy_gb_s: f64,
    /// Rate of multiplications and additions in the number type of this model's products.
    pub matmul_gflop_s: f64,
    /// That number type: `int8`, `bf16` or `f32`.
    pub matmul_numbers: &'static str,
}

impl Roofs {
    /// Measures for about a second. The weights' format and [`Options::exact`] select the
    /// arithmetic. `None` on a GPU, whose memory is not measured.
    ///
    /// # Errors
    /// If the number of processors is unknown, or there is too little memory to measure.
    pub fn measure(options: &Options, sizes: &Sizes) -> Result<Option<Self>, SessionError> {
        if options.device == Device::Cuda {
            return Ok(None);
        }
        let threads = match options.threads {
            Some(threads) => threads.get(),
            None => std::thread::available_parallelism().map_err(SessionError::Processors)?.get(),
        };
        let bandwidth = measure_bandwidth(threads).map_err(SessionError::Measure)?;
        let matmul = measure_matmul(threads, Isa::select(None).map_err(SessionError::Measure)?);
        let (matmul_gflop_s, matmul_numbers) = match sizes.main_format() {
            _ if options.exact => (matmul.f32_gop_s, "f32"),
            Format::Float(_) => (matmul.f32_gop_s, "f32"),
            format if is_float_code(format) => (matmul.f32_gop_s, "f32"),
            _ => (matmul.int8_gop_s, "int8"),
        };
        let (read_gb_s, copy_gb_s) = (bandwidth.read_gb_s, bandwidth.copy_gb_s);
        Ok(Some(Self {
            threads: bandwidth.threads,
            read_gb_s,
            copy_gb_s,
            matmul_gflop_s,
            matmul_numbers,
        }))
    }

    /// The roof that bounds `cost`, and the least time that it takes.
    pub fn over(&self, cost: &Cost) -> Roofline {
        roofline(cost, self.read_gb_s * 1e9, self.matmul_gflop_s * 1e9)
    }
}

fn is_float_code(format: Format) -> bool {
    match format {
        Format::Scaled(scaled) => !matches!(scaled.element, Element::Int(_)),
        _ => false,
    }
}
