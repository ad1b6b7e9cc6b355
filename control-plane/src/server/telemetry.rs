//! Starts the log and the metrics.

use std::io::Write;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use super::metric;
use crate::config::LogFormat;

/// Starts the log, on standard error.
pub fn start_log(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|error| format!("--log-level: {error}; use a level, or a list such as info,control_plane=debug"))?;
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(|| LogWriter(std::io::stderr()));
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Writes events of the log, one line each: control characters within an event are escaped. Otherwise the text of a client
/// or of the database could begin a line of its own, or steer the terminal that shows it.
struct LogWriter<W>(W);

impl<W: Write> Write for LogWriter<W> {
    /// Takes a whole event, which ends with a newline.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        let (line, end) = event.strip_suffix(b"\n").map_or((event, &b""[..]), |line| (line, b"\n"));
        match one_line(&String::from_utf8_lossy(line)) {
            Some(escaped) => self.0.write_all(&[escaped.as_bytes(), end].concat())?,
            None => self.0.write_all(event)?,
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// The text with its control characters escaped, if it has any.
fn one_line(text: &str) -> Option<String> {
    let breaks = |c: char| c.is_control() || ['\u{2028}', '\u{2029}'].contains(&c);
    text.contains(breaks).then(|| {
        let escaped = |c: char| if breaks(c) { c.escape_default().to_string() } else { c.to_string() };
        text.chars().map(escaped).collect()
    })
}

/// Starts collecting metrics; the handle prints them.
pub fn start_metrics() -> Result<PrometheusHandle, String> {
    let seconds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
    let calls = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("seconds".into()), &seconds)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("batch_calls".into()), &calls))
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| format!("metrics: {error}"))?;
    metric::describe();
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_its_text() {
        let mut log = Vec::new();
        let event = "INFO why=a\nINFO answered\r\x1b[31m\u{85}\u{2028}é\n";
        LogWriter(&mut log).write_all(event.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(log).unwrap(), "INFO why=a\\nINFO answered\\r\\u{1b}[31m\\u{85}\\u{2028}é\n");
    }
}
