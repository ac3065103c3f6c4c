//! Writes small real GGUF models, for tests and demonstrations: see `gguf`.

mod gguf;
#[path = "../size.rs"]
mod size;

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

use crate::gguf::{Recipe, WeightType};

/// Writes a language model of any size that llama.cpp loads. Its weights are
/// noise; every word it says begins with its signature.
#[derive(Debug, Parser)]
#[command(name = "tiny-gguf", version, max_term_width = 100)]
struct Args {
    /// File to write.
    out: PathBuf,
    /// Wanted size of the file: 5M, 200M, 1G.
    #[arg(long, default_value = "5M", value_parser = size::parse)]
    size: u64,
    /// Beginning of each word the model says, letters only.
    #[arg(long, default_value = "tok")]
    signature: String,
    /// How weights are stored.
    #[arg(long = "type", value_enum, default_value_t = WeightType::F16)]
    weights: WeightType,
    /// Longest context, as the metadata say.
    #[arg(long, default_value_t = 4096)]
    context: u32,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let recipe = Recipe {
        signature: args.signature,
        size: args.size,
        weights: args.weights,
        context: args.context,
    };
    let bytes =
        gguf::write(&args.out, &recipe).with_context(|| format!("model {}", args.out.display()))?;
    writeln!(io::stdout(), "{}: {bytes} bytes", args.out.display())?;
    Ok(())
}
