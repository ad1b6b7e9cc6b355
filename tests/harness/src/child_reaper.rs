//! The thread that starts all children. The kernel of Linux signals a child when its parent ends,
//! and takes the *thread* that started it for the parent. This thread therefore lives as long as
//! the process.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::Signal;

type Job = (Command, Sender<std::io::Result<Child>>);

static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();

/// Starts a child. The kernel sends it `on_death` if this process ends. Signals of the terminal do not reach it, since this
/// process stops its children in a certain order.
pub(crate) fn spawn(mut command: Command, on_death: Signal) -> Result<Child> {
    command.process_group(0);
    die_with_parent(&mut command, on_death);
    let program = command.get_program().to_owned();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in jobs {
                // The caller may have given up.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (answer, child) = channel();
    let sender = spawner.lock().map_err(|_| anyhow!("a thread died while it started a process"))?;
    sender.send((command, answer))?;
    drop(sender);
    child.recv()?.with_context(|| format!("cannot start {}", program.display()))
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the standard library has no safe way to set the parent's death signal")]
fn die_with_parent(command: &mut Command, signal: Signal) {
    // SAFETY: the closure makes one system call, which may be made between fork and exec.
    unsafe {
        command.pre_exec(move || nix::sys::prctl::set_pdeathsig(signal).map_err(Into::into));
    }
}

/// On other systems, children outlive a parent that is killed. They still end if the parent panics.
#[cfg(not(target_os = "linux"))]
fn die_with_parent(_: &mut Command, _: Signal) {}
