//! Memory of a GPU that is not there: told to the fake driver library of the
//! tests, and to residentd in the way any worker may.

use std::path::Path;
use std::{fs, io, thread};

use crate::args::Args;

/// Writes what this process says it holds, before it is ready.
///
/// # Errors
/// When a file cannot be written.
pub(crate) fn take(args: &Args) -> io::Result<()> {
    if args.vram_dir.is_some() {
        // So does a real driver's library; some drivers list such a thread.
        let idle = || {
            loop {
                thread::park();
            }
        };
        thread::Builder::new().name("driver".into()).spawn(idle)?;
        claim(args, args.vram)?;
    }
    if let (Some(report), Some(path)) = (&args.report, &args.report_file) {
        write_whole(path, &format!("{report}\n"))?;
    }
    Ok(())
}

/// Tells the fake driver that this process holds `bytes` of each visible GPU.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn claim(args: &Args, bytes: u64) -> io::Result<()> {
    let Some(folder) = &args.vram_dir else {
        return Ok(());
    };
    let line = |gpu: &String| format!("{gpu} {bytes}\n");
    let lines: String = args.gpus.iter().map(line).collect();
    let processes = folder.join("processes");
    fs::create_dir_all(&processes)?;
    write_whole(&processes.join(std::process::id().to_string()), &lines)
}

/// Writes a file so that a reader sees all of it or nothing.
pub(crate) fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let unfinished = path.with_added_extension("tmp");
    fs::write(&unfinished, text)?;
    fs::rename(&unfinished, path)
}
