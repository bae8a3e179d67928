//! What processes use: CPU seconds and memory, from /proc.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a process does for the system that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Decodes at the source.
    Walsender,
    /// Decodes at the target (Anabranch reads its own writes back).
    Echo,
    /// Writes at the target.
    Apply,
    /// Anabranch's daemon at the source.
    SourceDaemon,
    /// Anabranch's daemon at the target.
    TargetDaemon,
}

impl Part {
    /// Is it a process of Anabranch, not of a server?
    const fn is_daemon(self) -> bool {
        matches!(self, Self::SourceDaemon | Self::TargetDaemon)
    }

    /// Its name in results.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Walsender => "walsender",
            Self::Echo => "echo_walsender",
            Self::Apply => "apply",
            Self::SourceDaemon => "source_daemon",
            Self::TargetDaemon => "target_daemon",
        }
    }
}

/// Processes with their parts.
pub type Processes = Vec<(Part, u32)>;

/// CPU seconds, user and system, all threads, 10 ms exact; 0 for a process that is gone.
pub fn cpu_seconds(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some(at) = text.rfind(')') else { return 0.0 };
    let fields: Vec<&str> = text[at + 1..].split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
    (ticks(11).unwrap_or(0.0) + ticks(12).unwrap_or(0.0)) / 100.0
}

/// A line of /proc/PID/status, in MiB.
fn status_mib(pid: u32, name: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<f64>().ok())
        .unwrap_or(0.0)
        / 1024.0
}

/// Lets a process's peak of resident memory (`VmHWM`) begin anew.
fn forget_peak(pid: u32) {
    if let Err(error) = fs::write(format!("/proc/{pid}/clear_refs"), "5") {
        eprintln!("bench: the peak memory of {pid} is that since its start: {error}");
    }
}

/// CPU and memory over a stretch of time.
pub struct Meter {
    began: BTreeMap<u32, f64>,
    peaks: Arc<Mutex<BTreeMap<u32, f64>>>,
    sampler: tokio::task::JoinHandle<()>,
}

impl Meter {
    /// Begins to measure. Of a daemon's memory the kernel keeps the peak (resident, all of it), from here on. A
    /// server's process is looked at 20 times a second for what it holds for itself: all that is resident would count
    /// shared buffers with each of them.
    pub fn start(processes: &Processes) -> Self {
        for &(_, pid) in processes.iter().filter(|(part, _)| part.is_daemon()) {
            forget_peak(pid);
        }
        let began = processes
            .iter()
            .map(|&(_, pid)| (pid, cpu_seconds(pid)))
            .collect();
        let peaks = Arc::new(Mutex::new(BTreeMap::new()));
        let pids: Vec<u32> = processes
            .iter()
            .filter(|(part, _)| !part.is_daemon())
            .map(|&(_, pid)| pid)
            .collect();
        let into = Arc::clone(&peaks);
        let sampler = tokio::spawn(async move {
            loop {
                for &pid in &pids {
                    let now = status_mib(pid, "RssAnon");
                    let mut peaks = into.lock().expect("no panic holds it");
                    let peak = peaks.entry(pid).or_insert(0.0_f64);
                    *peak = peak.max(now);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self {
            began,
            peaks,
            sampler,
        }
    }

    /// `cpu_PART` in seconds and `mib_PART` at its peak (see [`Self::start`]), per part. `processes` are those of now: one that was
    /// started meanwhile counts from its start.
    pub fn stop(self, processes: &Processes) -> BTreeMap<String, f64> {
        self.sampler.abort();
        let mut found = BTreeMap::new();
        let peaks = self.peaks.lock().expect("no panic holds it");
        for &(part, pid) in processes {
            let cpu = cpu_seconds(pid) - self.began.get(&pid).copied().unwrap_or(0.0);
            *found.entry(format!("cpu_{}", part.name())).or_insert(0.0) += cpu;
            *found.entry("cpu_total".to_owned()).or_insert(0.0) += cpu;
            let peak = if part.is_daemon() {
                status_mib(pid, "VmHWM")
            } else {
                let sampled = peaks.get(&pid).copied();
                sampled.unwrap_or_else(|| status_mib(pid, "RssAnon"))
            };
            *found.entry(format!("mib_{}", part.name())).or_insert(0.0) += peak;
        }
        found
    }
}

/// The machine's load over the last minute.
pub fn load() -> f64 {
    fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemons_memory_is_all_that_is_resident_at_its_peak_since_the_start() {
        let me = std::process::id();
        let mib = |values: BTreeMap<String, f64>| values["mib_source_daemon"];
        let processes = vec![(Part::SourceDaemon, me)];
        drop(std::hint::black_box(vec![1_u8; 256 << 20]));
        let quiet = mib(Meter::start(&processes).stop(&processes));
        assert!(quiet > 0.0 && quiet < 200.0, "{quiet}");
        let meter = Meter::start(&processes);
        // Faster than anybody could look.
        drop(std::hint::black_box(vec![1_u8; 64 << 20]));
        let busy = mib(meter.stop(&processes));
        assert!(busy > quiet + 50.0, "{busy} after {quiet}");
    }
}
