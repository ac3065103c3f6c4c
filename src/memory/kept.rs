//! Files of the kernel that are read again and again.
//!
//! Opening and closing such a file costs several times what reading it does,
//! the more the longer nobody did: caches have forgotten the way to it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Enough for any of these files in one go; they are read again with more room
/// when it is not.
const ROOM: usize = 8192;

/// One file, kept open from its first reading on.
#[derive(Debug)]
pub(super) struct KeptFile {
    path: PathBuf,
    file: Option<File>,
}

impl KeptFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Reads the whole file as text into `text`; `None` when there is no such
    /// file. One that cannot be read any more, as those of a cgroup that was
    /// removed, is opened again by its name.
    pub(super) fn read<'a>(&mut self, text: &'a mut Vec<u8>) -> Option<&'a str> {
        let length = match self.read_open(text) {
            Some(length) if length > 0 => length,
            _ => {
                self.file = File::open(&self.path).ok();
                self.read_open(text)?
            }
        };
        std::str::from_utf8(&text[..length]).ok()
    }

    /// Reads a file that holds one number.
    pub(super) fn read_number(&mut self, text: &mut Vec<u8>) -> Option<u64> {
        self.read(text)?.trim().parse().ok()
    }

    /// The kernel makes each of these files as one piece, so that a reading that
    /// leaves room has seen all of it.
    fn read_open(&mut self, text: &mut Vec<u8>) -> Option<usize> {
        let file = self.file.as_ref()?;
        if text.is_empty() {
            text.resize(ROOM, 0);
        }
        loop {
            let length = file.read_at(text, 0).ok()?;
            if length < text.len() {
                return Some(length);
            }
            text.resize(text.len() * 2, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_changes_in_place_and_what_is_replaced_is_read_anew() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("memory.current");
        let mut file = KeptFile::new(path.clone());
        let mut text = Vec::new();
        assert_eq!(file.read(&mut text), None);
        fs::write(&path, "123\n").expect("a file");
        assert_eq!(file.read_number(&mut text), Some(123));
        fs::write(&path, "4567\n").expect("a file");
        assert_eq!(file.read_number(&mut text), Some(4567));
        fs::write(&path, "").expect("a file");
        fs::remove_file(&path).expect("it is there");
        fs::write(&path, "8\n").expect("a file");
        assert_eq!(file.read_number(&mut text), Some(8));
        assert_eq!(
            KeptFile::new("/proc/self/stat".into()).read_number(&mut text),
            None
        );
    }

    #[test]
    fn a_file_longer_than_the_room_is_read_whole() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("memory.stat");
        let long = "anon 1\n".repeat(ROOM);
        fs::write(&path, &long).expect("a file");
        let mut text = Vec::new();
        assert_eq!(KeptFile::new(path).read(&mut text), Some(long.as_str()));
    }

    #[test]
    fn the_kernels_own_file_is_read_anew_each_time() {
        let name = "/proc/thread-self/comm";
        let mut file = KeptFile::new(name.into());
        let mut text = Vec::new();
        for given in ["first", "second one"] {
            fs::write(name, given).expect("a thread may rename itself");
            assert_eq!(file.read(&mut text).map(str::trim_end), Some(given));
        }
    }
}
