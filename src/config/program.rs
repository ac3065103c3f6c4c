//! Whether a worker's program is there, as the system would look for it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::problem::Complaint;

/// Where programs are looked for when nobody says.
const USUAL_PATH: &str = "/bin:/usr/bin";

/// Looks for a program: below the folders of `search` when its name has no
/// slash, else at its path. Relative paths begin at `base`.
///
/// # Errors
/// Why it could not be started.
pub(super) fn find(program: &str, search: Option<&str>, base: &Path) -> Result<(), Complaint> {
    if program.contains('/') {
        let path = base.join(program);
        let (what, fix) = match fs::metadata(&path) {
            Err(_) => ("does not exist", "install it, or correct its path"),
            Ok(meta) if meta.is_dir() => ("is a folder", "name the program within"),
            Ok(meta) if !is_executable(&meta) => (
                "is not executable",
                "chmod +x it, or name its interpreter first",
            ),
            Ok(_) => return Ok(()),
        };
        return Err(Complaint::new(format!("{program:?} {what}"), fix));
    }
    let mut folders = std::env::split_paths(search.unwrap_or(USUAL_PATH));
    let is_there = folders.any(|folder| {
        fs::metadata(base.join(folder).join(program)).is_ok_and(|meta| is_executable(&meta))
    });
    if is_there {
        return Ok(());
    }
    Err(Complaint::new(
        format!("{program:?} is not on the PATH"),
        "install it, or write its full path",
    ))
}

fn is_executable(meta: &fs::Metadata) -> bool {
    meta.is_file() && meta.permissions().mode() & 0o111 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(program: &str, search: &str, base: &Path) -> String {
        find(program, Some(search), base)
            .expect_err("not to be found")
            .what
    }

    #[test]
    fn a_program_is_looked_for_as_the_system_would() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = folder.path();
        fs::create_dir(base.join("bin")).expect("created");
        fs::write(base.join("bin/engine"), "").expect("written");
        let engine = base.join("bin/engine");
        let set_mode = |mode| {
            fs::set_permissions(&engine, fs::Permissions::from_mode(mode)).expect("own file");
        };

        set_mode(0o644);
        assert_eq!(
            complaint("bin/engine", "", base),
            r#""bin/engine" is not executable"#
        );
        assert_eq!(
            complaint("engine", "/nowhere:bin", base),
            r#""engine" is not on the PATH"#
        );

        set_mode(0o755);
        assert_eq!(find("bin/engine", None, base), Ok(()));
        assert_eq!(find("engine", Some("/nowhere:bin"), base), Ok(()));
        assert_eq!(find("sh", None, base), Ok(()));
        assert_eq!(
            complaint("./bin/other", "bin", base),
            r#""./bin/other" does not exist"#
        );
        assert_eq!(complaint("./bin", "", base), r#""./bin" is a folder"#);
    }
}
