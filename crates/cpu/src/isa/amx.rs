//! Whether AMX can be used.

/// Whether this processor has AMX with `bf16` and `int8`, and the system lets this process use it.
/// Linux gives a process the tile registers when it asks for them.
pub(crate) fn is_available() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // Bits 22, 24, 25 of EDX: AMX-BF16, AMX-TILE, AMX-INT8.
    const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED;
    has && permitted()
}

#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` and the number of the tile data's state component.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call has no effect on memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}
