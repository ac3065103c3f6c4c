//! Flags of `serve` that stand for keys of the configuration file.

use clap::Args;

/// Single keys of the configuration file. They are kept as text: the
/// configuration checks them with everything else.
#[derive(Args, Clone, Debug, Default)]
pub struct SettingArgs {
    /// Folder for learned footprints, live workers, events and worker logs
    #[arg(long, value_name = "PATH")]
    pub state_dir: Option<String>,
    /// How long requests may finish at shutdown, as 30s
    #[arg(long, value_name = "TIME")]
    pub shutdown_grace: Option<String>,
    /// Whether workers outlive a residentd that dies and are taken back by the next: true or false
    #[arg(long, value_name = "BOOL")]
    pub adopt: Option<String>,
    /// The same as --adopt false: workers that are found are ended, and none outlives residentd
    #[arg(long, conflicts_with = "adopt")]
    pub no_adopt: bool,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// A level or filter, as info,residentd::worker=debug
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// The largest request body, as 1GiB
    #[arg(long, value_name = "SIZE")]
    pub max_body: Option<String>,
    /// How much of a body is read to find its model, as 1MiB
    #[arg(long, value_name = "SIZE")]
    pub model_prefix: Option<String>,
    /// Whether each request is written to access.jsonl in the state folder: true or false
    #[arg(long, value_name = "BOOL")]
    pub access_log: Option<String>,
    /// Whether the configuration is read anew when its files change: true or false
    #[arg(long, value_name = "BOOL")]
    pub watch_config: Option<String>,
    /// Memory limit of all workers together, as 8GiB
    #[arg(long, value_name = "SIZE")]
    pub limit: Option<String>,
    /// Physical memory that is never given to workers, as 512MiB
    #[arg(long, value_name = "SIZE")]
    pub reserve: Option<String>,
    /// Time between full checks when nothing happens, as 60s
    #[arg(long, value_name = "TIME")]
    pub check_interval: Option<String>,
    /// Whether idle models are unloaded under pressure: true or false
    #[arg(long, value_name = "BOOL")]
    pub auto_cleanup: Option<String>,
    /// Who goes to make room: lru or cost
    #[arg(long, value_name = "NAME")]
    pub policy: Option<String>,
    /// How long a request waits for busy workers before they are drained, as 5s
    #[arg(long, value_name = "TIME")]
    pub patience: Option<String>,
    /// When files are read into the page cache ahead of a worker: waiting, idle or off
    #[arg(long, value_name = "WHEN")]
    pub prefetch: Option<String>,
}

impl SettingArgs {
    /// Returns what was given: the key in the configuration file, and its
    /// text.
    #[must_use]
    pub fn given(&self) -> Vec<(&'static str, &str)> {
        let all = [
            ("server.state_dir", &self.state_dir),
            ("server.shutdown_grace", &self.shutdown_grace),
            ("server.adopt", &self.adopt),
            ("server.log_format", &self.log_format),
            ("server.log_level", &self.log_level),
            ("server.max_body", &self.max_body),
            ("server.model_prefix", &self.model_prefix),
            ("server.access_log", &self.access_log),
            ("server.watch_config", &self.watch_config),
            ("memory.limit", &self.limit),
            ("memory.reserve", &self.reserve),
            ("memory.check_interval", &self.check_interval),
            ("memory.auto_cleanup", &self.auto_cleanup),
            ("memory.policy", &self.policy),
            ("memory.patience", &self.patience),
            ("memory.prefetch", &self.prefetch),
        ];
        let no_adopt = self.no_adopt.then_some(("server.adopt", "false"));
        all.into_iter()
            .filter_map(|(key, text)| Some((key, text.as_deref()?)))
            .chain(no_adopt)
            .collect()
    }
}
