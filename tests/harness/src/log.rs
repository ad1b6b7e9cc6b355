//! The output of a child process: standard output and error go into one file, which can be searched
//! while the process runs, after it ended, and across restarts.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::wait::eventually;

/// The log of one process and its successors.
#[derive(Clone, Debug)]
pub struct Log(PathBuf);

impl Log {
    pub fn create(path: &Path) -> Result<Self> {
        File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn outputs(&self) -> Result<(Stdio, Stdio)> {
        let file = OpenOptions::new().append(true).open(&self.0)?;
        Ok((file.try_clone()?.into(), file.into()))
    }

    /// All of it, as far as it is UTF-8.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.0).unwrap_or_default()).into_owned()
    }

    pub fn lines_with(&self, text: &str) -> Vec<String> {
        self.text().lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }

    pub fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    pub async fn wait_for(&self, text: &str) -> Result<String> {
        let what = format!("a line with {text:?} in {}", self.0.display());
        eventually(&what, async || self.lines_with(text).into_iter().next()).await
    }
}
