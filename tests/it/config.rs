//! Configuration: every file in `configs/` loads, sources cover each other in
//! their order, and what is wrong is told in these words.

mod diff;
mod problems;
mod shown;
mod sources;
mod telemetry;

use std::fs;
use std::path::PathBuf;

use residentd::config::{Config, Problems, Sources, load};

/// A working directory with what the test puts into it.
struct Setup {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sources = Sources {
            working_dir: folder.path().to_path_buf(),
            environment: [("PATH".to_owned(), "/bin:/usr/bin".to_owned())].into(),
            ..Sources::default()
        };
        Self { folder, sources }
    }

    /// Writes a file that is no configuration.
    fn beside(self, name: &str, text: &str) -> Self {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().expect("below the folder")).expect("created");
        fs::write(path, text).expect("written");
        self
    }

    /// Writes a configuration file and names it with `--config`.
    fn file(mut self, name: &str, text: &str) -> Self {
        self.sources.paths.push(PathBuf::from(name));
        self.beside(name, text)
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        let environment = &mut self.sources.environment;
        environment.insert(name.to_owned(), value.to_owned());
        self
    }

    fn flag(&mut self, key: &str, text: &str) {
        self.sources.flags.push((key.to_owned(), text.to_owned()));
    }

    fn load(&self) -> Result<Config, Problems> {
        load(&self.sources)
    }

    fn config(&self) -> Config {
        self.load().unwrap_or_else(|problems| panic!("{problems}"))
    }

    /// The problems, with the temporary folder's name taken out.
    fn problems(&self) -> String {
        let problems = match self.load() {
            Ok(config) => config.warnings,
            Err(problems) => problems,
        };
        let folder = self.folder.path().display().to_string();
        problems.to_string().replace(&folder, "DIR")
    }
}

/// A model that is in order.
const MODEL: &str = "[models.a]\ncommand = ['sh', '${PORT}']\n";

fn one(text: &str) -> Setup {
    Setup::new().file("a.toml", text)
}

fn model(keys: &str) -> Setup {
    one(&format!("{MODEL}{keys}"))
}
