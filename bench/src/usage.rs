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
    /// Sessions of Anabranch's daemon at the source, where it applies what other nodes write and looks after the server.
    SourceSessions,
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
            Self::SourceSessions => "source_sessions",
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

/// What is looked at again and again.
struct Watch {
    processes: Processes,
    seen: Mutex<BTreeMap<u32, Seen>>,
}

/// What a process had when it was looked at last.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// CPU seconds since its start.
    cpu: f64,
    /// The most that it ever held for itself, in MiB.
    mib: f64,
}

impl Watch {
    fn look(&self) {
        for &(part, pid) in &self.processes {
            let cpu = cpu_seconds(pid);
            // The kernel itself keeps a daemon's peak.
            let mib = if part.is_daemon() {
                0.0
            } else {
                status_mib(pid, "RssAnon")
            };
            let mut seen = self.seen.lock().expect("no panic holds it");
            let last = seen.entry(pid).or_default();
            *last = Seen {
                cpu: last.cpu.max(cpu),
                mib: last.mib.max(mib),
            };
        }
    }

    fn last(&self, pid: u32) -> Option<Seen> {
        self.seen.lock().expect("no panic holds it").get(&pid).copied()
    }
}

/// CPU and memory over a stretch of time.
pub struct Meter {
    began: BTreeMap<u32, f64>,
    watch: Arc<Watch>,
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
        let watch = Arc::new(Watch {
            processes: processes.clone(),
            seen: Mutex::new(BTreeMap::new()),
        });
        let looking = Arc::clone(&watch);
        let sampler = tokio::spawn(async move {
            loop {
                looking.look();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self {
            began,
            watch,
            sampler,
        }
    }

    /// `cpu_PART` in seconds and `mib_PART` at its peak (see [`Self::start`]), per part. `processes` are those of now: one that was
    /// started meanwhile counts from its start, and one that has ended with what it had used when it was looked at last.
    pub fn stop(self, processes: &Processes) -> BTreeMap<String, f64> {
        self.sampler.abort();
        let mut found = BTreeMap::new();
        let mut take = |part: Part, pid: u32, until: f64| {
            let cpu = (until - self.began.get(&pid).copied().unwrap_or(0.0)).max(0.0);
            *found.entry(format!("cpu_{}", part.name())).or_insert(0.0) += cpu;
            *found.entry("cpu_total".to_owned()).or_insert(0.0) += cpu;
        };
        let gone = |pid: u32| !processes.iter().any(|(_, still)| *still == pid);
        for &(part, pid) in self.watch.processes.iter().filter(|(_, pid)| gone(*pid)) {
            let last = self.watch.last(pid).unwrap_or_default();
            take(part, pid, last.cpu);
        }
        for &(part, pid) in processes {
            take(part, pid, cpu_seconds(pid));
        }
        for &(part, pid) in processes {
            let peak = match self.watch.last(pid) {
                _ if part.is_daemon() => status_mib(pid, "VmHWM"),
                Some(seen) => seen.mib,
                None => status_mib(pid, "RssAnon"),
            };
            *found.entry(format!("mib_{}", part.name())).or_insert(0.0) += peak;
        }
        found
    }
}

/// Nobody stops the meter of a piece that failed.
impl Drop for Meter {
    fn drop(&mut self) {
        self.sampler.abort();
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
    async fn a_process_that_has_ended_counts_with_what_it_had_used() {
        let mut busy = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        let processes = vec![(Part::Apply, busy.id())];
        let meter = Meter::start(&processes);
        while cpu_seconds(busy.id()) < meter.began[&busy.id()] + 0.1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        meter.watch.look();
        busy.kill().unwrap();
        busy.wait().unwrap();
        let values = meter.stop(&Vec::new());
        assert!(values["cpu_apply"] >= 0.1 - 1e-9, "{values:?}");
        assert_eq!(values["cpu_apply"], values["cpu_total"]);
        assert!(!values.contains_key("mib_apply"), "{values:?}");
    }

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
