//! An adjustable wall clock for one process. Preloaded (`LD_PRELOAD`), this library replaces
//! `clock_gettime`, `gettimeofday` and `time` of the C library. The file that `PORTCULLIS_CLOCK`
//! names contains the offset: eight bytes, signed nanoseconds in native byte order. The file is
//! mapped, so a test can step the clock in both directions while the process runs. Monotonic clocks
//! are unchanged. Linux on 64 bits only; elsewhere the library is empty.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

use core::ffi::{CStr, c_char, c_int, c_long, c_void};
use core::ptr;
use core::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

const VARIABLE: &CStr = c"PORTCULLIS_CLOCK";
const NS_PER_S: i64 = 1_000_000_000;
const NS_PER_US: i64 = 1_000;

// Of Linux's headers.
const CLOCK_REALTIME: c_int = 0;
const CLOCK_REALTIME_COARSE: c_int = 5;
#[cfg(target_arch = "x86_64")]
const SYS_CLOCK_GETTIME: c_long = 228;
#[cfg(not(target_arch = "x86_64"))]
const SYS_CLOCK_GETTIME: c_long = 113;
const O_RDONLY: c_int = 0;
const PROT_READ: c_int = 1;
const MAP_SHARED: c_int = 1;

/// Seconds and nanoseconds, as C has them.
#[repr(C)]
#[derive(Debug)]
pub struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// Seconds and microseconds, as C has them.
#[repr(C)]
#[derive(Debug)]
pub struct Timeval {
    seconds: i64,
    microseconds: i64,
}

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn getenv(name: *const c_char) -> *const c_char;
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn close(file: c_int) -> c_int;
    fn mmap(at: *mut c_void, length: usize, protection: c_int, flags: c_int, file: c_int, offset: i64) -> *mut c_void;
}

/// What a process without the variable sees.
static NONE: AtomicI64 = AtomicI64::new(0);
static SHIFT: AtomicPtr<AtomicI64> = AtomicPtr::new(ptr::null_mut());

/// By how much the clock differs now.
fn shift_ns() -> i64 {
    let known = SHIFT.load(Ordering::Acquire);
    let shift = if known.is_null() { find() } else { known };
    // SAFETY: `find` gives the address of `NONE` or of a mapping that is never undone.
    unsafe { &*shift }.load(Ordering::Relaxed)
}

/// Maps the file; two threads that come at once map it twice, which does no harm.
fn find() -> *mut AtomicI64 {
    let none = (&raw const NONE).cast_mut();
    // SAFETY: C's functions with arguments as they want them; what they answer is checked.
    let found = unsafe {
        let path = getenv(VARIABLE.as_ptr());
        let file = if path.is_null() { -1 } else { open(path, O_RDONLY) };
        if file < 0 {
            none
        } else {
            let mapped = mmap(ptr::null_mut(), size_of::<i64>(), PROT_READ, MAP_SHARED, file, 0);
            close(file);
            if mapped.addr() == usize::MAX { none } else { mapped.cast() }
        }
    };
    SHIFT.store(found, Ordering::Release);
    found
}

/// As C has it.
///
/// # Safety
/// `to` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: c_int, to: *mut Timespec) -> c_int {
    // SAFETY: the kernel checks both.
    let answer = unsafe { syscall(SYS_CLOCK_GETTIME, clock, to) };
    if answer == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) {
        // SAFETY: the kernel has written there.
        if let Some(time) = unsafe { to.as_mut() } {
            let ns = time.seconds.saturating_mul(NS_PER_S).saturating_add(time.nanoseconds).saturating_add(shift_ns());
            *time = Timespec { seconds: ns.div_euclid(NS_PER_S), nanoseconds: ns.rem_euclid(NS_PER_S) };
        }
    }
    c_int::try_from(answer).unwrap_or(-1)
}

/// As C has it; the time zone has been left alone for decades.
///
/// # Safety
/// `to` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(to: *mut Timeval, _zone: *mut c_void) -> c_int {
    let mut now = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: a variable of ours.
    let answer = unsafe { clock_gettime(CLOCK_REALTIME, &raw mut now) };
    // SAFETY: the caller says so.
    if let Some(to) = unsafe { to.as_mut() } {
        *to = Timeval { seconds: now.seconds, microseconds: now.nanoseconds / NS_PER_US };
    }
    answer
}

/// As C has it.
///
/// # Safety
/// `to` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(to: *mut i64) -> i64 {
    let mut now = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: a variable of ours.
    unsafe { clock_gettime(CLOCK_REALTIME, &raw mut now) };
    // SAFETY: the caller says so.
    if let Some(to) = unsafe { to.as_mut() } {
        *to = now.seconds;
    }
    now.seconds
}
