//! CPU affinity, and the CPU time and memory of processes (Linux only).

use std::hint::black_box;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use portcullis_harness::process::resident_kib;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    /// Core of the measured Envoy alone.
    pub(crate) measured: usize,
    /// Core of the load generator, this process, and peers of Envoy.
    pub(crate) load: usize,
    all: CpuSet,
}

impl Cores {
    /// Chooses the first and the last core of this process.
    pub(crate) fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("the cores of this process cannot be read")?;
        let cores: Vec<usize> = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false)).collect();
        let (Some(&measured), Some(&load)) = (cores.first(), cores.last()) else { anyhow::bail!("there is no core") };
        ensure!(measured != load, "two cores are needed: one for Envoy, one for the load generator");
        Ok(Self { measured, load, all: allowed })
    }

    /// Moves all threads of this process, and processes that they start from now on, to the core of the load generator.
    pub(crate) fn stay_off(self) -> Result<()> {
        move_threads(&only(self.load)?)
    }

    /// Lets them run on all cores again.
    pub(crate) fn spread(self) -> Result<()> {
        move_threads(&self.all)
    }
}

fn move_threads(to: &CpuSet) -> Result<()> {
    for thread in std::fs::read_dir("/proc/self/task")? {
        let thread = thread?.file_name().to_string_lossy().parse().unwrap_or_default();
        // The thread may have ended meanwhile.
        let _ = sched_setaffinity(Pid::from_raw(thread), to);
    }
    Ok(())
}

fn only(core: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(core).with_context(|| format!("core {core} cannot be named"))?;
    Ok(set)
}

/// Lets a command run on one core only.
#[expect(unsafe_code, reason = "the standard library has no safe way to choose a child's processor")]
pub(crate) fn pin(command: &mut Command, core: usize) -> Result<()> {
    let set = only(core)?;
    // SAFETY: the closure makes one system call, which may be made between fork and exec.
    unsafe {
        command.pre_exec(move || sched_setaffinity(Pid::from_raw(0), &set).map_err(Into::into));
    }
    Ok(())
}

/// How long a fixed amount of work takes on a core now: the fastest of three tries. On a shared machine, load on the other
/// hardware thread of the core doubles that time, for seconds at a time.
pub(crate) fn probe(core: usize) -> Result<Duration> {
    let on_core = move || -> Result<Duration> {
        sched_setaffinity(Pid::from_raw(0), &only(core)?)?;
        let tries = (0..3).map(|_| {
            let start = Instant::now();
            black_box(work(black_box(1)));
            start.elapsed()
        });
        Ok(tries.min().unwrap_or_default())
    };
    std::thread::spawn(on_core).join().map_err(|_| anyhow::anyhow!("the probe panicked"))?
}

/// Arithmetic in four independent chains, to saturate the core.
fn work(seed: u64) -> u64 {
    let mut sums = [seed, seed ^ 2, seed ^ 3, seed ^ 4];
    for round in 0..300_000_u64 {
        for sum in &mut sums {
            *sum = sum.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ round;
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// CPU time of all threads of a process, in nanoseconds.
pub(crate) fn cpu_ns(process: u32) -> Result<u64> {
    let directory = format!("/proc/{process}/task");
    let threads = std::fs::read_dir(&directory).with_context(|| format!("{directory} cannot be read"))?;
    Ok(threads.flatten().map(|thread| thread_cpu_ns(&thread.path())).sum())
}

/// The same of a process and its children, including children that have ended.
pub(crate) fn family_cpu_ns(process: u32) -> Result<u64> {
    /// Unit of the CPU time of ended children in `/proc` (USER_HZ).
    const TICK_NS: u64 = 10_000_000;
    /// Fields of `/proc/<pid>/stat`, counted from behind the name, which may contain spaces (proc_pid_stat(5)).
    const PARENT: usize = 1;
    const ENDED: [usize; 2] = [13, 14];
    let numbers = |of: u32| -> Option<Vec<i64>> {
        let stat = std::fs::read_to_string(format!("/proc/{of}/stat")).ok()?;
        let behind = stat.rsplit_once(") ")?.1;
        // The state, which comes first, is a letter.
        Some(behind.split_whitespace().map(|field| field.parse().unwrap_or_default()).collect())
    };
    let own = numbers(process).context("the process is gone")?;
    let ticks: i64 = ENDED.iter().filter_map(|place| own.get(*place)).sum();
    let mut sum = cpu_ns(process)? + ticks.unsigned_abs() * TICK_NS;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(other) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if numbers(other).is_some_and(|fields| fields.get(PARENT) == Some(&i64::from(process))) {
            sum += cpu_ns(other).unwrap_or_default();
        }
    }
    Ok(sum)
}

/// CPU time in nanoseconds, 0 for a thread that has ended.
fn thread_cpu_ns(thread: &Path) -> u64 {
    let text = std::fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default()
}

/// Resident memory of a process in bytes.
pub(crate) fn resident_bytes(process: u32) -> Result<u64> {
    Ok(resident_kib(process).context("the process has ended")? * 1_024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_process_uses_can_be_read() {
        let me = std::process::id();
        assert!(cpu_ns(me).unwrap() > 0);
        assert!(resident_bytes(me).unwrap() > 100_000);
        assert!(cpu_ns(u32::MAX).is_err());
    }

    #[test]
    fn what_a_child_uses_counts_while_it_runs_and_after_it_has_ended() {
        const BUSY: u64 = 50_000_000;
        let me = std::process::id();
        let grown = |before| family_cpu_ns(me).unwrap().saturating_sub(before) >= BUSY;
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let before = family_cpu_ns(me).unwrap();
        // Threads of other tests may end meanwhile, with what they have used.
        while cpu_ns(child.id()).unwrap() < 4 * BUSY {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(grown(before));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(grown(before));
    }
}
