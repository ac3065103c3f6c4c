//! Giving the folder to another residentd, and taking it back.

use std::sync::Arc;

use super::{FLUSH, Store};
use crate::telemetry;

impl Store {
    /// Writes everything and lets another residentd have the folder; what is kept
    /// from now on is not written. Blocks for some seconds at most.
    ///
    /// # Errors
    /// Why it cannot: the text says it. [`Store::take_again`] has to follow then
    /// too.
    pub fn let_go(&self) -> Result<(), Arc<str>> {
        self.writer.pause(FLUSH)?;
        let unlocked = self.lock.unlock();
        unlocked.map_err(|error| telemetry::chain(&error).to_string().into())
    }

    /// Takes the folder again, when the other residentd did not get on with it,
    /// and writes what was kept meanwhile. Blocks while the disk does.
    ///
    /// # Errors
    /// When somebody has it, or no thread can be started.
    pub fn take_again(&self) -> std::io::Result<()> {
        self.lock.try_lock()?;
        self.writer.resume()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Bytes, Domain};
    use crate::store::StoreError;

    #[test]
    fn a_folder_that_is_let_go_can_be_opened_by_another_and_taken_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let ours = Store::open(folder.path(), &[]).expect("it can be opened");
        ours.keep_limit(Domain::Host, Bytes::mib(1));
        let held = Store::open(folder.path(), &[]);
        assert!(matches!(held, Err(StoreError::Held { .. })), "{held:?}");
        ours.let_go().expect("it is written");
        ours.keep_limit(Domain::Gpu(0), Bytes::mib(2));
        {
            let theirs = Store::open(folder.path(), &[]).expect("it is free");
            assert_eq!(theirs.name(), ours.name());
            assert_eq!(theirs.limit(Domain::Host), Some(Bytes::mib(1)));
            assert_eq!(theirs.limit(Domain::Gpu(0)), None, "not written");
            assert!(ours.take_again().is_err(), "they have it");
            theirs.let_go().expect("it is written");
        }
        ours.take_again().expect("it is free again");
        ours.flush();
        assert_eq!(ours.trouble(), None);
        ours.let_go().expect("it is written");
        let theirs = Store::open(folder.path(), &[]).expect("it is free");
        assert_eq!(theirs.limit(Domain::Gpu(0)), Some(Bytes::mib(2)));
    }
}
