//! `Device`: one GPU, its stream, the embedded kernels and its memory. Every call of the driver is
//! here.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};
use lathe_program::{BackendError, DeviceMemory};

use crate::parameters::Parameters;

/// Name and fatbin of each module.
const MODULES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The compute capability that the kernels are compiled for.
const CAPABILITY: (i32, i32) = (9, 0);

/// Bytes of the widest access to shared memory.
const SHARED_UNIT: usize = 16;

/// Why no device could be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No driver library.
    #[error("no NVIDIA driver: libcuda.so is not on this system")]
    NoDriver,
    /// A driver, but no GPU with this number.
    #[error("no NVIDIA device {ordinal}: the driver has {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// Devices that the driver has.
        count: usize,
    },
    /// The kernels do not run on it.
    #[error(
        "{name} has compute capability {major}.{minor}; Lathe's kernels are compiled for 9.0 \
         (Hopper)"
    )]
    Capability {
        /// The device's name.
        name: String,
        /// What it has.
        major: i32,
        /// As `major`.
        minor: i32,
    },
    /// A call failed.
    #[error("{0}")]
    Driver(String),
}

impl From<DriverError> for DeviceError {
    fn from(error: DriverError) -> Self {
        DeviceError::Driver(driver_text(error))
    }
}

impl From<DeviceError> for BackendError {
    fn from(error: DeviceError) -> Self {
        BackendError::Device(error.to_string())
    }
}

fn driver_text(error: DriverError) -> String {
    let name = error.error_name().ok().and_then(|name| name.to_str().ok());
    format!("CUDA driver: {}", name.unwrap_or("unknown error"))
}

pub(crate) fn failed(what: &str) -> impl Fn(DriverError) -> BackendError {
    move |error| BackendError::Device(format!("{what}: {}", driver_text(error)))
}

/// One GPU with the kernels loaded.
pub struct Device {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    functions: HashMap<String, sys::CUfunction>,
}

// SAFETY: the driver's handles may be used from any thread; each call binds the context first.
unsafe impl Send for Device {}
// SAFETY: as above, and the driver locks what its calls share.
unsafe impl Sync for Device {}

impl Device {
    /// Opens GPU number `ordinal`.
    ///
    /// # Errors
    /// [`DeviceError`] says what is absent or does not fit.
    pub fn open(ordinal: usize) -> Result<Arc<Device>, DeviceError> {
        // SAFETY: looks for the library by its names, and calls nothing.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        // A driver without a GPU fails here already: it has no device then.
        if result::init().is_err() {
            return Err(DeviceError::NoDevice { ordinal, count: 0 });
        }
        let count = result::device::get_count()? as usize;
        if ordinal >= count {
            return Err(DeviceError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal)?;
        let (major, minor) = context.compute_capability()?;
        if (major, minor) != CAPABILITY {
            return Err(DeviceError::Capability { name: context.name()?, major, minor });
        }
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        let mut functions = HashMap::new();
        for (_, fatbin) in MODULES {
            load(fatbin, &mut functions)?;
        }
        Ok(Arc::new(Device { context, stream, functions }))
    }

    /// Total and free bytes.
    ///
    /// # Errors
    /// If the driver cannot tell.
    pub fn memory(&self) -> Result<DeviceMemory, BackendError> {
        let (free, total) = self.context.mem_get_info().map_err(failed("memory"))?;
        Ok(DeviceMemory { total_bytes: total as u64, free_bytes: free as u64 })
    }

    pub(crate) fn allocate(
        self: &Arc<Self>,
        bytes: usize,
        what: &'static str,
    ) -> Result<Memory, BackendError> {
        self.bind()?;
        // The driver refuses 0 bytes.
        // SAFETY: the context is bound; the pointer is freed once, by `Memory`.
        let address = unsafe { result::malloc_sync(bytes.max(16)) }
            .map_err(|_| BackendError::Memory { what, bytes })?;
        Ok(Memory { device: Arc::clone(self), address, bytes })
    }

    /// Runs a kernel after all work submitted before.
    pub(crate) fn launch(
        &self,
        kernel: &str,
        [x, y]: [usize; 2],
        (threads, shared_bytes): (usize, usize),
        parameters: &impl Parameters,
    ) -> Result<(), BackendError> {
        let shape = LaunchShape { grid: [x, y, 1], threads, shared_bytes, dependent: false };
        self.launch_shaped(kernel, shape, parameters)
    }

    pub(crate) fn launch_shaped(
        &self,
        kernel: &str,
        shape: LaunchShape,
        parameters: &impl Parameters,
    ) -> Result<(), BackendError> {
        let function = *self.functions.get(kernel).ok_or_else(|| {
            BackendError::Device(format!("the kernel {kernel} is not in this binary"))
        })?;
        let mut arguments = [std::ptr::from_ref(parameters) as *mut c_void];
        // SAFETY: an attribute is plain data, and this one reads no other field of the union.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid[0] as u32,
            gridDimY: shape.grid[1] as u32,
            gridDimZ: shape.grid[2] as u32,
            blockDimX: shape.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            // The compiler reads shared memory in wider units than a number.
            sharedMemBytes: shape.shared_bytes.next_multiple_of(SHARED_UNIT) as u32,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: u32::from(shape.dependent),
        };
        // SAFETY: `parameters` has the layout of the kernel's only argument (`parameters.rs`), and
        // the driver copies it before the call returns.
        unsafe {
            sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(failed(kernel))
    }

    /// Lets a kernel have so many bytes of shared memory in a block.
    pub(crate) fn allow_shared(&self, kernel: &str, bytes: usize) -> Result<(), BackendError> {
        let Some(function) = self.functions.get(kernel) else { return Ok(()) };
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of a module that stays loaded.
        unsafe { result::function::set_function_attribute(*function, attribute, bytes as i32) }
            .map_err(failed(kernel))
    }

    /// Records what `submit` launches, in place of running it.
    pub(crate) fn record(
        self: &Arc<Self>,
        submit: impl FnOnce() -> Result<(), BackendError>,
    ) -> Result<Graph, BackendError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("a graph"))?;
        let submitted = submit();
        // SAFETY: the capture began above.
        let graph = unsafe { result::stream::end_capture(self.stream) };
        submitted?;
        let graph = graph.map_err(failed("a graph"))?;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was just made, and nobody else has it.
        let instance = unsafe { result::graph::instantiate(graph, flags) };
        // SAFETY: as above; the instance does not need it.
        unsafe { result::graph::destroy(graph) }.map_err(failed("a graph"))?;
        Ok(Graph { device: Arc::clone(self), instance: instance.map_err(failed("a graph"))? })
    }

    /// Waits for all work submitted so far.
    pub(crate) fn synchronize(&self) -> Result<(), BackendError> {
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("a step"))
    }

    pub(crate) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), BackendError> {
        if bytes == 0 || from == to {
            return Ok(());
        }
        // SAFETY: callers pass addresses within memory that they own, `bytes` long.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(failed("a copy"))
    }

    pub(crate) fn bind(&self) -> Result<(), BackendError> {
        self.context.bind_to_thread().map_err(failed("the context"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: nobody has the stream any more. A failure leaves nothing to be done.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}

/// Loads a fatbin and finds its kernels.
fn load(
    fatbin: &[u8],
    functions: &mut HashMap<String, sys::CUfunction>,
) -> Result<(), DeviceError> {
    // SAFETY: the bytes are a fatbin that nvcc made; modules stay loaded as long as the context.
    let module = unsafe { result::module::load_data(fatbin.as_ptr().cast()) }?;
    let mut count = 0;
    // SAFETY: `module` was just loaded.
    unsafe { sys::cuModuleGetFunctionCount(&mut count, module) }.result()?;
    let mut found = vec![std::ptr::null_mut(); count as usize];
    // SAFETY: there is room for `count` functions.
    unsafe { sys::cuModuleEnumerateFunctions(found.as_mut_ptr(), count, module) }.result()?;
    for function in found {
        let mut name = std::ptr::null();
        // SAFETY: the driver owns the name, which is a C string.
        let name = unsafe {
            sys::cuFuncGetName(&mut name, function).result()?;
            std::ffi::CStr::from_ptr(name)
        };
        functions.insert(CString::from(name).to_string_lossy().into_owned(), function);
    }
    Ok(())
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LaunchShape {
    pub(crate) grid: [usize; 3],
    pub(crate) threads: usize,
    pub(crate) shared_bytes: usize,
    /// The kernel waits by itself for the one before it (`wait_dependencies`), and may be started
    /// while that one runs.
    pub(crate) dependent: bool,
}

/// Launches that were recorded.
pub(crate) struct Graph {
    device: Arc<Device>,
    instance: sys::CUgraphExec,
}

// SAFETY: as `Device`.
unsafe impl Send for Graph {}

impl Graph {
    /// Runs them after all work submitted before.
    pub(crate) fn launch(&self) -> Result<(), BackendError> {
        // SAFETY: the instance and the stream are this device's and alive.
        unsafe { result::graph::launch(self.instance, self.device.stream) }
            .map_err(failed("a graph"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: nobody has the instance any more; a run that goes on keeps what it needs.
            let _ = unsafe { result::graph::exec_destroy(self.instance) };
        }
    }
}

/// Tokens on their way to the host, in memory that the device writes itself.
pub(crate) struct TokenBox {
    device: Arc<Device>,
    tokens: *mut u32,
    capacity: usize,
    arrived: sys::CUevent,
}

// SAFETY: the memory and the event belong to this box alone.
unsafe impl Send for TokenBox {}

impl TokenBox {
    pub(crate) fn new(device: &Arc<Device>, capacity: usize) -> Result<Self, BackendError> {
        device.bind()?;
        let capacity = capacity.max(1);
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let arrived = result::event::create(flags).map_err(failed("an event"))?;
        // SAFETY: the context is bound; the memory is freed once, by `drop`.
        let tokens = unsafe { result::malloc_host(capacity * 4, 0) };
        let tokens = tokens.map_err(failed("host memory"))?.cast::<u32>();
        // SAFETY: the memory was just allocated, and is so long.
        unsafe { std::ptr::write_bytes(tokens, 0, capacity) };
        Ok(Self { device: Arc::clone(device), tokens, capacity, arrived })
    }

    /// Copies `count` tokens after all work submitted before, without waiting.
    pub(crate) fn fetch(&mut self, from: &Memory, count: usize) -> Result<(), BackendError> {
        assert!(count <= self.capacity && count * 4 <= from.bytes, "{count} tokens");
        let (to, stream) = (self.tokens.cast::<c_void>(), self.device.stream);
        // SAFETY: both ranges hold `count` tokens; `wait` comes before the host reads them.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to, from.address, count * 4, stream) }
            .result()
            .map_err(failed("the tokens"))?;
        // SAFETY: the event and the stream are alive.
        unsafe { result::event::record(self.arrived, stream) }.map_err(failed("the tokens"))
    }

    /// Waits for the tokens fetched last, and reads `count` of them.
    pub(crate) fn wait(&mut self, count: usize) -> Result<&[u32], BackendError> {
        assert!(count <= self.capacity, "{count} tokens");
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.arrived) }.map_err(failed("a step"))?;
        // SAFETY: the memory is initialised and so long, and the device has written it.
        Ok(unsafe { std::slice::from_raw_parts(self.tokens, count) })
    }
}

impl Drop for TokenBox {
    fn drop(&mut self) {
        if self.device.bind().is_ok() && self.device.synchronize().is_ok() {
            // SAFETY: nothing that was submitted uses them any more.
            let _ = unsafe { result::free_host(self.tokens.cast()) };
            // SAFETY: as above.
            let _ = unsafe { result::event::destroy(self.arrived) };
        }
    }
}

/// Bytes on a device.
pub(crate) struct Memory {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Memory {
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies to the device, after all work submitted before; the source may be reused at once.
    pub(crate) fn write<T: bytemuck::NoUninit>(
        &self,
        offset: usize,
        values: &[T],
    ) -> Result<(), BackendError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(offset + bytes.len() <= self.bytes, "a write of {} bytes", bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        let to = self.address + offset as u64;
        // SAFETY: the range is inside this memory. Pageable memory is staged before the call
        // returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.device.stream) }
            .map_err(failed("a copy to the device"))
    }

    /// Copies from the device and waits.
    pub(crate) fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        offset: usize,
        values: &mut [T],
    ) -> Result<(), BackendError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        assert!(offset + bytes.len() <= self.bytes, "a read of {} bytes", bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        let from = self.address + offset as u64;
        // SAFETY: the range is inside this memory; the stream is waited for before `bytes` is read.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.device.stream) }
            .map_err(failed("a copy from the device"))?;
        self.device.synchronize()
    }

    /// Sets all bytes to zero.
    pub(crate) fn zero(&self) -> Result<(), BackendError> {
        // SAFETY: the range is this memory.
        unsafe { result::memset_d8_async(self.address, 0, self.bytes, self.device.stream) }
            .map_err(failed("zeros"))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `Device::allocate`, freed here only. The driver waits for work
            // that uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}
