//! Checks each model, and the models against each other.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::context::{Context, from_working_dir, given};
use super::problem::{Place, Problems};
use super::raw::RawModel;
use super::section::Setting;
use super::units::write_size;
use super::upstream::{self, Address};
use super::variables::Scope;
use super::{Listen, park, program, weights};
use crate::model::{Bytes, ModelName, ModelSpec, Prefetch, UpstreamSpec};
use crate::template::{Template, escape};

/// What a model is checked against.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) context: &'a Context<'a>,
    pub(super) scope: &'a Scope<'a>,
    pub(super) limit: Option<&'a Setting<Bytes>>,
    pub(super) prefetch: Option<&'a Setting<Prefetch>>,
    pub(super) listen: &'a [Listen],
}

/// Checks all models. Those that are wrong are told and left out.
pub(super) fn check(
    models: BTreeMap<ModelName, Setting<RawModel>>,
    defaults: &RawModel,
    facts: &Facts<'_>,
    problems: &mut Problems,
) -> Vec<ModelSpec> {
    check_names(&models, problems);
    let mut specs = Vec::new();
    let mut fixed = BTreeMap::new();
    for (name, Setting { value, place }) in models {
        let model = Model {
            name,
            place,
            raw: value.over(defaults.clone()),
            facts,
        };
        let raw = (&model.raw.upstream, &model.raw.grpc_upstream);
        let upstream = model.upstream(raw.0.as_ref(), problems);
        let grpc_upstream = model.upstream(raw.1.as_ref(), problems);
        let asked = [
            ("upstream", raw.0, &upstream),
            ("grpc_upstream", raw.1, &grpc_upstream),
        ];
        for (key, setting, checked) in asked {
            if let Some(address) = checked.as_ref().and_then(|u| u.fixed.as_ref()) {
                let place = model.place_of(setting.as_ref().map(|setting| &setting.place), key);
                model.check_address((address, &place), &mut fixed, problems);
            }
        }
        let specs_of = |checked: Option<upstream::Checked>| checked.map(|checked| checked.spec);
        let upstreams = (specs_of(upstream), specs_of(grpc_upstream));
        specs.extend(model.into_spec(upstreams, problems));
    }
    specs
}

/// Gives every model the values its templates may need.
pub(super) fn share_variables(
    specs: Vec<ModelSpec>,
    values: BTreeMap<String, String>,
) -> Vec<Arc<ModelSpec>> {
    let variables = Arc::new(values);
    let share = |spec| {
        Arc::new(ModelSpec {
            variables: Arc::clone(&variables),
            ..spec
        })
    };
    specs.into_iter().map(share).collect()
}

/// Tells aliases that name another model, or the same one twice.
fn check_names(models: &BTreeMap<ModelName, Setting<RawModel>>, problems: &mut Problems) {
    let mut owners: BTreeMap<&ModelName, &Place> = BTreeMap::new();
    for model in models.values() {
        let Some(aliases) = &model.value.aliases else {
            continue;
        };
        let fix = "a name stands for one model: remove it here or there";
        for alias in &aliases.value {
            if let Some(other) = models.get(alias) {
                let what = format!("{:?} is the name of {}", alias.as_str(), other.place.key);
                problems.error(&aliases.place, what, fix);
            } else if let Some(other) = owners.insert(alias, &model.place) {
                if other == &model.place {
                    let what = format!("names {:?} twice", alias.as_str());
                    problems.error(&aliases.place, what, "remove one");
                    continue;
                }
                let what = format!("{:?} is an alias of {} too", alias.as_str(), other.key);
                problems.error(&aliases.place, what, fix);
            }
        }
    }
}

/// One model with its defaults filled in, while it is checked.
#[derive(Debug)]
struct Model<'a> {
    name: ModelName,
    place: Place,
    raw: RawModel,
    facts: &'a Facts<'a>,
}

/// Templates of a model that are in order.
#[derive(Debug, Default)]
struct Templates {
    command: Vec<Template>,
    env: BTreeMap<String, Template>,
    cwd: Option<Template>,
}

impl Model<'_> {
    fn into_spec(
        self,
        (upstream, grpc_upstream): (Option<UpstreamSpec>, Option<UpstreamSpec>),
        problems: &mut Problems,
    ) -> Option<ModelSpec> {
        let templates = self.templates(problems);
        if self.raw.command.is_none() && !problems.mentions(&self.place.below("command").key) {
            let fix =
                r#"write e.g. command = ["llama-server", "-m", "model.gguf", "--port", "${PORT}"]"#;
            problems.error(&self.place, "has no command", fix);
        }
        let templates = templates?;
        if let Some(upstream) = &upstream {
            self.check_port(&templates, (upstream, grpc_upstream.as_ref()), problems);
        }
        self.check_program(&templates, problems);
        self.check_cwd(&templates, problems);
        let weights = self.weights(&templates, problems);
        self.check_memory(&weights, problems);
        self.check_ceiling(problems);
        self.check_gpus(&templates, problems);
        self.check_park(&templates, problems);
        self.raw.requests.check(problems);

        let command = self.command(&templates)?;
        let cwd = self.cwd();
        let raw = self.raw;
        let text = |(name, setting): (String, Setting<String>)| (name, setting.value);
        Some(ModelSpec {
            name: self.name,
            aliases: raw.aliases.map(|a| a.value).unwrap_or_default(),
            kind: given(raw.kind),
            command,
            cwd,
            env: raw.env.into_iter().map(text).collect(),
            variables: Arc::default(),
            upstream: upstream?,
            grpc_upstream,
            ready: given(raw.ready),
            live: raw.live.given(),
            start_timeout: given(raw.start_timeout),
            stop_timeout: given(raw.stop_timeout),
            stop_signal: given(raw.stop_signal),
            idle_timeout: raw.idle_timeout.map(|t| t.value).filter(|t| !t.is_zero()),
            pinned: given(raw.pinned),
            preload: given(raw.preload),
            memory: raw.memory.map(|memory| memory.value),
            gpus: given(raw.gpus),
            vram: raw.vram.map(|vram| vram.value),
            max_memory: raw.max_memory.map(|ceiling| ceiling.value),
            park: raw.park.and_then(|park| park.value.spec),
            weights,
            prefetch: given(raw.prefetch.or_else(|| self.facts.prefetch.cloned())),
            concurrency: given(raw.concurrency),
            max_queue: given(raw.max_queue),
            queue_timeout: given(raw.queue_timeout),
            requests: raw.requests.given(),
        })
    }

    /// Reads every template, so that all that is wrong with any is told.
    fn templates(&self, problems: &mut Problems) -> Option<Templates> {
        let scope = self.facts.scope;
        let mut is_good = true;
        let mut templates = Templates::default();
        let mut read = |text: &str, place: &Place| {
            let template = scope.template(text, place, problems);
            is_good &= template.is_some();
            template
        };
        if let Some(command) = &self.raw.command {
            let words = command.value.iter();
            let words = words.filter_map(|word| read(word, &command.place));
            templates.command = words.collect();
        }
        for (name, setting) in &self.raw.env {
            if let Some(template) = read(&setting.value, &setting.place) {
                templates.env.insert(name.clone(), template);
            }
        }
        if let Some(cwd) = &self.raw.cwd {
            templates.cwd = read(&cwd.value, &cwd.place);
        }
        (is_good && self.raw.command.is_some()).then_some(templates)
    }

    fn upstream(
        &self,
        setting: Option<&Setting<String>>,
        problems: &mut Problems,
    ) -> Option<upstream::Checked> {
        let setting = setting?;
        let template = self
            .facts
            .scope
            .template(&setting.value, &setting.place, problems)?;
        let sample = self.facts.scope.sample(&template, &self.name);
        match upstream::read(&setting.value, &template, &sample) {
            Ok(checked) => Some(checked),
            Err(complaint) => {
                problems.complain(&setting.place, complaint);
                None
            }
        }
    }

    /// Tells a fixed address that somebody else has.
    fn check_address(
        &self,
        (address, place): (&Address, &Place),
        fixed: &mut BTreeMap<Address, String>,
        problems: &mut Problems,
    ) {
        let fix = "use ${PORT} in command and upstream, and each worker gets its own";
        let context = self.facts.context;
        let is_ours = self.facts.listen.iter().any(|l| address.is(l, context));
        if is_ours {
            let what = format!("{address} is where residentd itself listens");
            problems.error(place, what, fix);
        }
        if let Some(other) = fixed.insert(address.clone(), self.place.key.clone()) {
            let what = format!("{address} is the upstream of {other} too");
            problems.error(place, what, fix);
        }
    }

    /// Tells a worker that would listen elsewhere than it is asked.
    fn check_port(
        &self,
        templates: &Templates,
        (upstream, grpc_upstream): (&UpstreamSpec, Option<&UpstreamSpec>),
        problems: &mut Problems,
    ) {
        // After a problem with the user's own upstream this compares with the
        // default one.
        let is_told = |key: &str| {
            let own = &self.place.below(key).key;
            problems.mentions(own) || problems.mentions(&format!("defaults.{key}"))
        };
        if is_told("upstream") || is_told("grpc_upstream") {
            return;
        }
        let asks = |upstream: &UpstreamSpec, name: &str| {
            Template::parse(upstream.text()).is_ok_and(|asks| asks.uses(name))
        };
        let is_asked = |name: &str| {
            asks(upstream, name) || grpc_upstream.is_some_and(|upstream| asks(upstream, name))
        };
        let words = || templates.command.iter().chain(templates.env.values());
        let is_given = |name: &str| words().any(|template| template.uses(name));
        let shown = |name: &str| match name {
            "GRPC_PORT" => ("grpc_upstream", &self.raw.grpc_upstream, grpc_upstream),
            _ => ("upstream", &self.raw.upstream, Some(upstream)),
        };

        let is_unused = |name: &&str| is_given(name) && !is_asked(name);
        if let Some(name) = upstream::OF_LIFE.into_iter().find(is_unused) {
            let (key, setting, upstream) = shown(name);
            let what = match upstream {
                Some(upstream) => format!("{:?} never uses ${{{name}}}", upstream.to_string()),
                None => format!("there is none that uses ${{{name}}}"),
            };
            let what = format!("{what}, but the worker is given it");
            let fix = match name {
                "SOCKET" => r#"write upstream = "unix:${SOCKET}""#.to_owned(),
                _ => format!("write {key} = \"http://127.0.0.1:${{{name}}}\""),
            };
            let place = self.place_of(setting.as_ref().map(|setting| &setting.place), key);
            problems.error(&place, what, fix);
            return;
        }
        for name in upstream::OF_LIFE {
            if is_asked(name) && !is_given(name) {
                let (key, _, upstream) = shown(name);
                let own = self.raw.command.as_ref().map(|command| &command.place);
                let upstream = upstream.map(ToString::to_string).unwrap_or_default();
                let what = format!("never uses ${{{name}}}, but {key} is {upstream:?}");
                let fix = format!(
                    "give ${{{name}}} to the worker in command or env, or write its fixed address as {key}"
                );
                problems.error(&self.place_of(own, "command"), what, fix);
            }
        }
    }

    fn check_program(&self, templates: &Templates, problems: &mut Problems) {
        let (Some(command), Some(program)) = (&self.raw.command, templates.command.first()) else {
            return;
        };
        let search = templates.env.get("PATH").map(|path| self.sample(path));
        let environment = self.facts.context.environment;
        let search = search.as_ref().or_else(|| environment.get("PATH"));
        let found = program::find(
            &self.sample(program),
            search.map(String::as_str),
            self.facts.context.working_dir,
        );
        if let Err(complaint) = found {
            problems.warn(&command.place, complaint.what, complaint.fix);
        }
    }

    fn check_cwd(&self, templates: &Templates, problems: &mut Problems) {
        if let (Some(cwd), Some(template)) = (&self.raw.cwd, &templates.cwd) {
            let folder = from_working_dir(self.facts.context, &self.sample(template));
            if !folder.is_dir() {
                let what = format!("{:?} is not a folder", folder.display().to_string());
                problems.warn(&cwd.place, what, "create it, or correct the path");
            }
        }
    }

    fn weights(&self, templates: &Templates, problems: &mut Problems) -> Vec<PathBuf> {
        let context = self.facts.context;
        let Some(declared) = &self.raw.weights else {
            let base = match &templates.cwd {
                Some(cwd) => from_working_dir(context, &self.sample(cwd)),
                None => context.working_dir.to_path_buf(),
            };
            let arguments = templates.command.iter().skip(1);
            let arguments: Vec<_> = arguments.map(|a| self.sample(a)).collect();
            return weights::find(&arguments, &base);
        };
        let mut files = Vec::new();
        for path in &declared.value {
            let found = weights::resolve(&from_working_dir(context, path));
            if found.is_empty() {
                let what = format!("{path:?} is neither a file nor a folder of *.safetensors");
                problems.warn(
                    &declared.place,
                    what,
                    "correct the path, or fetch the weights",
                );
            }
            files.extend(found);
        }
        files
    }

    fn check_memory(&self, weights: &[PathBuf], problems: &mut Problems) {
        let Some(limit) = self.facts.limit else {
            return;
        };
        if let Some(memory) = &self.raw.memory {
            if let Some(what) = over_limit(memory.value, limit) {
                let fix = format!("raise {}, or declare what it really needs", limit.place.key);
                problems.error(&memory.place, what, fix);
            }
            return;
        }
        let size = weights::total(weights);
        if size > limit.value {
            let what = format!(
                "its weight files hold {}, more than {} ({})",
                write_size(size),
                limit.place.key,
                write_size(limit.value)
            );
            let fix = format!("raise {}, or declare memory", limit.place.key);
            problems.warn(&self.place, what, fix);
        }
    }

    fn check_ceiling(&self, problems: &mut Problems) {
        if let (Some(ceiling), Some(memory)) = (&self.raw.max_memory, &self.raw.memory)
            && ceiling.value < memory.value
        {
            let what = format!(
                "{} is under its memory ({}), so it would be recycled after each load",
                write_size(ceiling.value),
                write_size(memory.value)
            );
            problems.error(&ceiling.place, what, "raise it over what the model needs");
        }
    }

    /// Tells what is said of GPUs by a model that runs on none.
    fn check_gpus(&self, templates: &Templates, problems: &mut Problems) {
        let gpus = self.raw.gpus.as_ref();
        if gpus.is_some_and(|gpus| gpus.value.count() > 0) {
            return;
        }
        let fix = r#"write e.g. gpus = 1, or remove it"#;
        // One that is shared by all models may not concern this one.
        let own = |place: &Place| place.key == self.place.below("vram").key;
        if let Some(vram) = self.raw.vram.as_ref().filter(|vram| own(&vram.place)) {
            problems.error(&vram.place, "is set, but the model runs on no GPU", fix);
        }
        let mut words = templates.command.iter().chain(templates.env.values());
        if words.any(|template| template.uses("GPU")) {
            let place = self.place_of(gpus.map(|gpus| &gpus.place), "gpus");
            let what = "is none, but the worker is given ${GPU}";
            problems.error(&place, what, fix);
        }
    }

    fn check_park(&self, templates: &Templates, problems: &mut Problems) {
        let Some(park) = &self.raw.park else { return };
        let on_gpu = self.raw.gpus.as_ref().is_some_and(|g| g.value.count() > 0);
        let place = self.place_of(Some(&park.place), "park");
        park::check_use((park, &place), on_gpu, self.raw.vram.as_ref(), problems);
        if let Some(engine) = park.value.engine {
            let command: Vec<_> = templates.command.iter().map(|w| self.sample(w)).collect();
            let environment = self.facts.context.environment;
            let is_set =
                |name: &str| templates.env.contains_key(name) || environment.get(name).is_some();
            park::check_engine((engine, &place), &command, is_set, problems);
        }
    }

    /// Returns the command with a relative program made absolute, so that the
    /// worker's own directory does not change which program it is.
    fn command(&self, templates: &Templates) -> Option<Vec<String>> {
        let mut command = self.raw.command.as_ref()?.value.clone();
        let program = self.sample(templates.command.first()?);
        if program.contains('/') && !program.starts_with('/') {
            let word = command.first_mut()?;
            *word = self.absolute(word);
        }
        Some(command)
    }

    /// Returns the worker's directory, made absolute.
    fn cwd(&self) -> Option<String> {
        let cwd = &self.raw.cwd.as_ref()?.value;
        Some(match cwd.starts_with('/') {
            true => cwd.clone(),
            false => self.absolute(cwd),
        })
    }

    /// Puts the working directory before a relative template.
    fn absolute(&self, template: &str) -> String {
        let base = self.facts.context.working_dir.to_string_lossy();
        let template = template.strip_prefix("./").unwrap_or(template);
        format!("{}/{template}", escape(base.trim_end_matches('/')))
    }

    fn sample(&self, template: &Template) -> String {
        self.facts.scope.sample(template, &self.name)
    }

    /// Returns where a key of this model was written, or where it could be
    /// when its value is inherited.
    fn place_of(&self, own: Option<&Place>, key: &str) -> Place {
        let path = self.place.below(key);
        match own {
            Some(place) if place.key == path.key => place.clone(),
            _ => path,
        }
    }
}

/// Returns the texts of a declared need and of the limit it is over.
fn over_limit(need: Bytes, limit: &Setting<Bytes>) -> Option<String> {
    (need > limit.value).then(|| {
        format!(
            "{} is over {} ({})",
            write_size(need),
            limit.place.key,
            write_size(limit.value)
        )
    })
}
