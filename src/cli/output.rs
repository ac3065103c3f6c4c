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

/// Returns rows as aligned columns, two spaces between: the first `words`
/// columns to the left, numbers to the right. No line ends in spaces.
pub(super) fn table(rows: &[Vec<String>], words: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(&widths).enumerate();
        let padded: Vec<_> = cells
            .map(|(column, (cell, &width))| {
                if column < words {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        padded.join("  ").trim_end().to_owned()
    });
    let mut text: String = lines.collect::<Vec<_>>().join("\n");
    text.push('\n');
    text
}
