//! Writes to standard output and standard error. A reader that has gone, as
//! `head` does, ends the program quietly.

use std::io::{self, Write};

/// Standard output cannot be written to.
#[derive(Debug, thiserror::Error)]
#[error("write to standard output")]
pub(super) struct OutputError(#[from] io::Error);

impl OutputError {
    /// Returns whether the reader has simply gone.
    pub(super) fn is_closed_pipe(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Writes bytes at once.
pub(super) fn write(bytes: &[u8]) -> Result<(), OutputError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Writes a text that ends with exactly one newline.
pub(super) fn write_text(text: &str) -> Result<(), OutputError> {
    write(format!("{}\n", text.trim_end_matches('\n')).as_bytes())
}

/// Tells a person what went wrong, with all its causes.
pub(super) fn complain(error: &anyhow::Error) {
    let mut err = io::stderr().lock();
    // With standard error gone too there is nobody left to tell.
    let _ = writeln!(err, "residentd: {error}");
    for cause in error.chain().skip(1) {
        let _ = writeln!(err, "  caused by: {cause}");
    }
}
