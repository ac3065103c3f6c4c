//! What `${…}` may name, checked before any worker is spawned.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;

use super::env::Environment;
use super::problem::{Complaint, Place, Problems};
use super::section::{Setting, nearest};
use crate::model::ModelName;
use crate::template::{Template, TemplateError};

/// Filled in by the worker at spawn.
const AT_SPAWN: [&str; 6] = ["PORT", "GRPC_PORT", "SOCKET", "MODEL", "STATE_DIR", "GPU"];

/// Documented, without a feature in this version.
const LATER: [&str; 1] = ["PID"];

/// Begins the name of an environment variable.
const ENV: &str = "env:";

/// How to write what only looks like a variable.
const LITERAL: &str = "write $${ for a literal ${";

/// The variables templates may use, and which of the environment they did.
#[derive(Debug)]
pub(super) struct Scope<'a> {
    own: BTreeMap<String, String>,
    state_dir: String,
    environment: &'a Environment,
    used: RefCell<BTreeMap<String, String>>,
}

impl<'a> Scope<'a> {
    /// Reads `[variables]`: plain values, in which only `${env:NAME}` is
    /// filled in.
    pub(super) fn new(
        variables: BTreeMap<String, Setting<String>>,
        state_dir: String,
        environment: &'a Environment,
        problems: &mut Problems,
    ) -> Self {
        let mut scope = Self {
            own: BTreeMap::new(),
            state_dir,
            environment,
            used: RefCell::default(),
        };
        for (name, Setting { value, place }) in variables {
            if let Err(complaint) = check_name(&name) {
                problems.complain(&place, complaint);
            }
            let value = scope.own_value(&value).unwrap_or_else(|complaint| {
                problems.complain(&place, complaint);
                String::new()
            });
            // A bad one is known all the same, so its users are not told too.
            scope.own.insert(name, value);
        }
        scope
    }

    /// Reads a template; every name it uses that cannot be filled in is told.
    pub(super) fn template(
        &self,
        text: &str,
        place: &Place,
        problems: &mut Problems,
    ) -> Option<Template> {
        let template = match Template::parse(text) {
            Ok(template) => template,
            Err(error) => {
                problems.error(place, error.to_string(), format!("close it, or {LITERAL}"));
                return None;
            }
        };
        let mut is_good = true;
        for name in template.variables() {
            if let Err(complaint) = self.check_use(name) {
                problems.complain(place, complaint);
                is_good = false;
            }
        }
        is_good.then_some(template)
    }

    /// Fills a checked template in as the worker would, with samples for what
    /// is only known at spawn: ports 1 and 2, and a path for the socket.
    pub(super) fn sample(&self, template: &Template, model: &ModelName) -> String {
        let value = |name: &str| match name {
            "PORT" => Some(Cow::Borrowed("1")),
            "GRPC_PORT" => Some(Cow::Borrowed("2")),
            "SOCKET" => Some(Cow::Borrowed("/sample.sock")),
            "MODEL" => Some(Cow::Owned(model.to_string())),
            "GPU" => Some(Cow::Borrowed("GPU-0")),
            "STATE_DIR" => Some(Cow::Owned(self.state_dir.clone())),
            _ => self.lookup(name).map(|text| Cow::Owned(text.clone())),
        };
        template
            .expand(&value)
            .expect("`template` returned only templates whose variables are known")
    }

    /// Returns what workers need to fill in their templates: `STATE_DIR`, the
    /// user's own, and the values of the `env:NAME` that were used.
    pub(super) fn into_values(self) -> BTreeMap<String, String> {
        let mut values = self.used.into_inner();
        values.extend(self.own);
        values.insert("STATE_DIR".to_owned(), self.state_dir);
        values
    }

    fn lookup(&self, name: &str) -> Option<&String> {
        match name.strip_prefix(ENV) {
            Some(variable) => self.environment.get(variable),
            None => self.own.get(name),
        }
    }

    fn check_use(&self, name: &str) -> Result<(), Complaint> {
        if AT_SPAWN.contains(&name) {
            return Ok(());
        }
        if let Some(value) = self.lookup(name) {
            if name.starts_with(ENV) {
                let mut used = self.used.borrow_mut();
                used.insert(name.to_owned(), value.clone());
            }
            return Ok(());
        }
        if let Some(variable) = name.strip_prefix(ENV) {
            return Err(unset(variable));
        }
        if LATER.contains(&name) {
            return Err(Complaint::new(
                format!("${{{name}}} is not supported by this version"),
                format!("remove it, or {LITERAL}"),
            ));
        }
        let known = AT_SPAWN
            .into_iter()
            .chain(self.own.keys().map(String::as_str));
        let fix = match nearest(name, known) {
            Some(known) => format!("did you mean ${{{known}}}?"),
            None => format!("define it in [variables], or {LITERAL}"),
        };
        let name = name.to_owned();
        Err(Complaint::new(
            TemplateError::Unknown { name }.to_string(),
            fix,
        ))
    }

    fn own_value(&self, text: &str) -> Result<String, Complaint> {
        let template = Template::parse(text)
            .map_err(|e| Complaint::new(e.to_string(), format!("close it, or {LITERAL}")))?;
        let value = |name: &str| {
            let variable = name.strip_prefix(ENV)?;
            self.environment.get(variable).map(Cow::from)
        };
        template.expand(&value).map_err(|error| {
            let name = template.variables().find(|name| value(name).is_none());
            match name.and_then(|name| name.strip_prefix(ENV)) {
                Some(variable) => unset(variable),
                None => Complaint::new(
                    error.to_string(),
                    format!("a variable may only use ${{env:NAME}}; or {LITERAL}"),
                ),
            }
        })
    }
}

fn unset(variable: &str) -> Complaint {
    Complaint::new(
        format!("${{env:{variable}}} is not set"),
        format!("set {variable} in the environment or in .env"),
    )
}

/// Checks the name of one of the user's own variables.
fn check_name(name: &str) -> Result<(), Complaint> {
    if AT_SPAWN.contains(&name) || LATER.contains(&name) {
        return Err(Complaint::new(
            format!("${{{name}}} has a meaning of its own"),
            "choose another name",
        ));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !name.chars().all(good) {
        return Err(Complaint::new(
            format!("{name:?} is not a variable's name"),
            "write letters, digits and _, a letter first",
        ));
    }
    Ok(())
}
