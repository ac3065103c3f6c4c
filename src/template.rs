//! Texts with variables, as in `--port ${PORT}`. Pure: the caller says what a
//! name stands for. `$${` is a literal `${`; any other `$` is itself.

use std::borrow::Cow;

/// A text split into its literal parts and its variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    Variable(String),
}

/// Why a template cannot be read or filled in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// A `${` without its `}`.
    #[error("${{{rest} has no closing brace")]
    Unclosed {
        /// What follows the `${`.
        rest: String,
    },
    /// Nobody knows this variable.
    #[error("unknown variable ${{{name}}}")]
    Unknown {
        /// The text between the braces.
        name: String,
    },
}

impl Template {
    /// Splits a text into literal parts and variables. Names are not checked.
    ///
    /// # Errors
    /// [`TemplateError::Unclosed`] when a `${` has no `}`.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            literal.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("$${") {
                literal.push_str("${");
                rest = after;
            } else if let Some(after) = rest.strip_prefix("${") {
                let Some((name, after)) = after.split_once('}') else {
                    return Err(TemplateError::Unclosed {
                        rest: after.to_owned(),
                    });
                };
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal)));
                }
                parts.push(Part::Variable(name.to_owned()));
                rest = after;
            } else {
                literal.push('$');
                rest = &rest[1..];
            }
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Ok(Self { parts })
    }

    /// Returns the names of the variables, in order, as often as they occur.
    pub fn variables(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Literal(_) => None,
            Part::Variable(name) => Some(name.as_str()),
        })
    }

    /// Returns whether the variable occurs.
    #[must_use]
    pub fn uses(&self, name: &str) -> bool {
        self.variables().any(|used| used == name)
    }

    /// Fills in every variable with what `lookup` says of it. Values are taken
    /// as they are, not searched for variables again.
    ///
    /// # Errors
    /// [`TemplateError::Unknown`] for the first name `lookup` does not know.
    pub fn expand<'v>(
        &self,
        lookup: &dyn Fn(&str) -> Option<Cow<'v, str>>,
    ) -> Result<String, TemplateError> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Variable(name) => {
                    let value = lookup(name)
                        .ok_or_else(|| TemplateError::Unknown { name: name.clone() })?;
                    text.push_str(&value);
                }
            }
        }
        Ok(text)
    }
}

/// Returns a template that stands for exactly this text.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace("${", "$${")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expand(text: &str) -> Result<String, TemplateError> {
        Template::parse(text)?.expand(&|name| match name {
            "PORT" => Some(Cow::Borrowed("8081")),
            "ODD" => Some(Cow::Borrowed("${PORT}")),
            _ => None,
        })
    }

    #[test]
    fn variables_are_filled_in_where_they_stand() {
        assert_eq!(
            expand("http://h:${PORT}/${PORT}").expect("known"),
            "http://h:8081/8081"
        );
        assert_eq!(expand("").expect("known"), "");
    }

    #[test]
    fn a_doubled_dollar_writes_the_brace_and_a_lone_one_is_itself() {
        assert_eq!(expand("$${PORT}").expect("literal"), "${PORT}");
        assert_eq!(
            expand("cost $5, $$, $PORT $").expect("literal"),
            "cost $5, $$, $PORT $"
        );
        assert_eq!(expand("$$${PORT}").expect("literal"), "$${PORT}");
    }

    #[test]
    fn a_value_is_not_searched_for_variables_again() {
        assert_eq!(expand("${ODD}").expect("known"), "${PORT}");
    }

    #[test]
    fn an_unknown_name_and_a_missing_brace_are_errors_that_show_the_text() {
        assert_eq!(
            expand("${POTR}").expect_err("unknown").to_string(),
            "unknown variable ${POTR}"
        );
        assert_eq!(
            expand("a ${PORT").expect_err("unclosed").to_string(),
            "${PORT has no closing brace"
        );
    }

    #[test]
    fn the_names_of_a_template_are_known_before_it_is_filled_in() {
        let template = Template::parse("${A}-${env:B}-${A}").expect("closed");
        assert_eq!(
            template.variables().collect::<Vec<_>>(),
            ["A", "env:B", "A"]
        );
        assert!(template.uses("env:B") && !template.uses("B"));
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_but_never_panics(text in r"[${}A-Z\PC]{0,40}") {
            let _ = expand(&text);
        }

        #[test]
        fn an_escaped_text_expands_to_itself(text in "[${}A-Z]{0,20}") {
            prop_assert_eq!(expand(&escape(&text)).expect("no variables"), text);
        }
    }
}
