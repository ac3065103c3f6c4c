//! One table while it is read, key by key.
//!
//! A key is known because the code asks for it: whatever nobody asked for is
//! an unknown key, and what was asked for is what a misspelt one is compared
//! with. So the two cannot drift apart.

use std::collections::BTreeMap;
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use super::problem::{Complaint, Origin, Place, Problems};
use super::value::Value;

/// A checked value with the place it was written at.
#[derive(Clone, Debug)]
pub(super) struct Setting<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

/// What is needed of a file's text to name the line of a value.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    index: usize,
    name: Arc<str>,
    /// Offsets at which lines begin.
    starts: Vec<usize>,
}

impl Lines {
    /// Finds the lines of the file that is read as number `index`.
    pub(super) fn new(index: usize, name: &str, text: &str) -> Self {
        let ends = text.match_indices('\n').map(|(at, _)| at + 1);
        Self {
            index,
            name: Arc::from(name),
            starts: std::iter::once(0).chain(ends).collect(),
        }
    }

    /// Returns the line, from 1, and the offset its text begins at.
    pub(super) fn at(&self, offset: usize) -> (usize, usize) {
        let line = self.starts.partition_point(|start| *start <= offset);
        let start = line.checked_sub(1).and_then(|i| self.starts.get(i));
        (line, start.copied().unwrap_or(0))
    }

    fn origin(&self, offset: usize) -> Origin {
        Origin::File {
            index: self.index,
            name: Arc::clone(&self.name),
            line: self.at(offset).0,
        }
    }
}

/// Where the tables of one file come from.
#[derive(Clone, Debug)]
pub(super) enum Text {
    /// The defaults within the binary.
    BuiltIn,
    /// A file.
    File(Lines),
}

impl Text {
    fn origin(&self, offset: usize) -> Origin {
        match self {
            Self::BuiltIn => Origin::BuiltIn,
            Self::File(lines) => lines.origin(offset),
        }
    }
}

/// One table while it is read.
#[derive(Debug)]
pub(super) struct Section<'a> {
    /// Where the table itself begins.
    pub(super) place: Place,
    text: Option<&'a Text>,
    entries: BTreeMap<String, (Value<'a>, Place)>,
    asked: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// Opens a table of a file.
    pub(super) fn open(place: Place, table: &'a DeTable<'a>, text: &'a Text) -> Self {
        let mut entries = BTreeMap::new();
        for (key, value) in table {
            let mut entry = place.below(key.get_ref());
            entry.origin = text.origin(key.span().start);
            let value = Value::Toml(value.get_ref());
            entries.insert(key.get_ref().to_string(), (value, entry));
        }
        Self {
            place,
            text: Some(text),
            entries,
            asked: Vec::new(),
        }
    }

    /// Makes a table of what variables or flags say.
    pub(super) fn of(entries: BTreeMap<String, (Value<'a>, Place)>) -> Self {
        Self {
            place: Place {
                key: String::new(),
                origin: Origin::Environment,
            },
            text: None,
            entries,
            asked: Vec::new(),
        }
    }

    /// Reads one key, when it is there; a bad value is told and counts as
    /// absent.
    pub(super) fn get<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&Value<'a>) -> Result<T, Complaint>,
        problems: &mut Problems,
    ) -> Option<Setting<T>> {
        self.asked.push(key);
        let (value, place) = self.entries.remove(key)?;
        match read(&value) {
            Ok(value) => Some(Setting { value, place }),
            Err(complaint) => {
                problems.complain(&place, complaint);
                None
            }
        }
    }

    /// Reads a list, or a single item as a list of one; each bad item is told.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&Value<'a>) -> Result<T, Complaint>,
        problems: &mut Problems,
    ) -> Option<Setting<Vec<T>>> {
        self.asked.push(key);
        let (value, place) = self.entries.remove(key)?;
        let items = value
            .items()
            .map_err(|complaint| problems.complain(&place, complaint))
            .ok()?;
        let mut list = Vec::with_capacity(items.len());
        for item in &items {
            match read(item) {
                Ok(item) => list.push(item),
                Err(complaint) => problems.complain(&place, complaint),
            }
        }
        (list.len() == items.len()).then_some(Setting { value: list, place })
    }

    /// Opens the table under a key.
    pub(super) fn table(
        &mut self,
        key: &'static str,
        problems: &mut Problems,
    ) -> Option<Section<'a>> {
        self.asked.push(key);
        let (value, place) = self.entries.remove(key)?;
        self.open_entry(value, place, problems)
    }

    /// Opens every entry as a table, under its key.
    pub(super) fn tables(mut self, problems: &mut Problems) -> Vec<(String, Section<'a>)> {
        let mut tables = Vec::new();
        for (key, (value, place)) in std::mem::take(&mut self.entries) {
            if let Some(table) = self.open_entry(value, place, problems) {
                tables.push((key, table));
            }
        }
        tables
    }

    /// Reads every entry as a text, under its key. It may be a secret, so what
    /// it is instead is not shown.
    pub(super) fn texts(self, problems: &mut Problems) -> BTreeMap<String, Setting<String>> {
        let text = |value: &Value<'a>| {
            let is_text = value.as_text().is_some();
            value.text().map_err(|complaint| match is_text {
                true => complaint,
                false => Complaint::new("is not a text", "write it in quotes"),
            })
        };
        self.each(text, problems)
    }

    /// Reads every entry, under its key; each bad one is told and left out.
    pub(super) fn each<T>(
        self,
        read: impl Fn(&Value<'a>) -> Result<T, Complaint>,
        problems: &mut Problems,
    ) -> BTreeMap<String, Setting<T>> {
        let mut all = BTreeMap::new();
        for (key, (value, place)) in self.entries {
            match read(&value) {
                Ok(value) => {
                    all.insert(key, Setting { value, place });
                }
                Err(complaint) => problems.complain(&place, complaint),
            }
        }
        all
    }

    /// Refuses keys that are known but may not stand here.
    pub(super) fn refuse(&mut self, keys: &[&str], what: &str, fix: &str, problems: &mut Problems) {
        for key in keys {
            if let Some((_, place)) = self.entries.remove(*key) {
                problems.error(&place, what, fix);
            }
        }
    }

    /// Tells every key nobody asked for. `later` are keys that exist in the
    /// documentation but not in this version.
    pub(super) fn finish(self, later: &[&str], problems: &mut Problems) {
        for (key, (value, place)) in &self.entries {
            if later.contains(&key.as_str()) {
                problems.error(place, "is not supported by this version", "remove it");
                continue;
            }
            let fix = match nearest(key, self.asked.iter().copied()) {
                Some(known) => format!("did you mean {known:?}?"),
                None if self.is_split_name(value) => format!(
                    "a name with a dot is written in quotes, as in [models.\"{}.{key}\"]",
                    self.place.key.trim_start_matches("models.")
                ),
                None => format!("known here: {}", self.asked.join(", ")),
            };
            problems.error(place, "unknown key", fix);
        }
    }

    /// Returns whether a table within a model looks like the second half of a
    /// name with a dot, as in `[models.llama3.1]`.
    fn is_split_name(&self, value: &Value<'_>) -> bool {
        self.place.key.starts_with("models.") && matches!(value, Value::Toml(DeValue::Table(_)))
    }

    fn open_entry(
        &self,
        value: Value<'a>,
        place: Place,
        problems: &mut Problems,
    ) -> Option<Section<'a>> {
        match (&value, self.text) {
            (Value::Toml(DeValue::Table(table)), Some(text)) => {
                Some(Section::open(place, table, text))
            }
            _ => {
                let fix = match place.key.as_str() {
                    "models" => "write [models.NAME] for each".to_owned(),
                    key => format!("write [{key}] with its keys below"),
                };
                problems.complain(&place, value.is_not("a table", fix));
                None
            }
        }
    }
}

/// Returns the known word that `word` is most likely a slip of.
pub(super) fn nearest<'k>(word: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let slips = known.map(|known| (strsim::damerau_levenshtein(word, known), known));
    let (distance, nearest) = slips.min()?;
    // A third of the letters may be wrong; more is another word.
    (distance <= (nearest.len() / 3).max(1)).then_some(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_finds_its_word_and_another_word_finds_none() {
        let known = ["start_timeout", "stop_timeout", "env", "cwd"];
        let near = |word| nearest(word, known.into_iter());
        assert_eq!(near("start_timout"), Some("start_timeout"));
        assert_eq!(near("stop-timeout"), Some("stop_timeout"));
        assert_eq!(near("evn"), Some("env"));
        assert_eq!(near("gpu"), None);
        assert_eq!(near(""), None);
    }

    #[test]
    fn a_value_is_on_the_line_its_key_begins() {
        let lines = Lines::new(0, "a.toml", "a = 1\n\nb = 2\n");
        assert_eq!(lines.at(0), (1, 0));
        assert_eq!(lines.at(4), (1, 0));
        assert_eq!(lines.at(7), (3, 7));
        assert_eq!(lines.at(999).0, 4);
        assert_eq!(Lines::new(0, "", "").at(0), (1, 0));
    }
}
