//! An adjustable wall clock for one process. Preloaded (`LD_PRELOAD`), this library replaces
//! `clock_gettime`, `gettimeofday` and `time` of the C library. The file that `PORTCULLIS_CLOCK`
//! names contains the offset: eight bytes, signed nanoseconds in native byte order. The file is
//! mapped, so a test can step the clock in both directions while the process runs. Monotonic clocks
//! are unchanged. Linux on 64 bits only; elsewhere the library is empty.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

use core::ffi::{CStr, c_int, c_void};
use core::ptr;
use core::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

use libc::{MAP_SHARED, O_RDONLY, PROT_READ, timespec, timeval};

const VARIABLE: &CStr = c"PORTCULLIS_CLOCK";
const NS_PER_S: i64 = 1_000_000_000;
const NS_PER_US: i64 = 1_000;

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
        let path = libc::getenv(VARIABLE.as_ptr());
        let file = if path.is_null() { -1 } else { libc::open(path, O_RDONLY) };
        if file < 0 {
            none
        } else {
            let mapped = libc::mmap(ptr::null_mut(), size_of::<i64>(), PROT_READ, MAP_SHARED, file, 0);
            libc::close(file);
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
pub unsafe extern "C" fn clock_gettime(clock: c_int, to: *mut timespec) -> c_int {
    // SAFETY: the kernel checks both.
    let answer = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, to) };
    if answer == 0 && [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_COARSE].contains(&clock) {
        // SAFETY: the kernel has written there.
        if let Some(time) = unsafe { to.as_mut() } {
            let ns = time.tv_sec.saturating_mul(NS_PER_S).saturating_add(time.tv_nsec).saturating_add(shift_ns());
            *time = timespec { tv_sec: ns.div_euclid(NS_PER_S), tv_nsec: ns.rem_euclid(NS_PER_S) };
        }
    }
    c_int::try_from(answer).unwrap_or(-1)
}

/// As C has it; the time zone has been left alone for decades.
///
/// # Safety
/// `to` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(to: *mut timeval, _zone: *mut c_void) -> c_int {
    let mut now = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a variable of ours.
    let answer = unsafe { clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
    // SAFETY: the caller says so.
    if let Some(to) = unsafe { to.as_mut() } {
        *to = timeval { tv_sec: now.tv_sec, tv_usec: now.tv_nsec / NS_PER_US };
    }
    answer
}

/// As C has it.
///
/// # Safety
/// `to` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(to: *mut i64) -> i64 {
    let mut now = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a variable of ours.
    unsafe { clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
    // SAFETY: the caller says so.
    if let Some(to) = unsafe { to.as_mut() } {
        *to = now.tv_sec;
    }
    now.tv_sec
}
