//! The files of our memory cgroup and of those above it.

use super::{Cgroup, CgroupReading, NO_LIMIT, Version};
use crate::memory::kept::KeptFile;
use crate::model::Bytes;

/// Every level from our own cgroup up to the mount point, with its files open.
#[derive(Debug)]
pub(in crate::memory) struct Levels {
    place: Cgroup,
    levels: Vec<Level>,
    text: Vec<u8>,
}

#[derive(Debug)]
struct Level {
    path: String,
    limits: Vec<KeptFile>,
    current: KeptFile,
    stat: KeptFile,
}

impl Levels {
    pub(in crate::memory) fn of(place: Cgroup) -> Self {
        // Over `memory.high` nobody is ended, but whoever takes more is slowed
        // down until it hardly moves: what lies above is of no use.
        let (limits, current): (&[_], _) = match place.version {
            Version::One => (&["memory.limit_in_bytes"], "memory.usage_in_bytes"),
            Version::Two => (&["memory.max", "memory.high"], "memory.current"),
        };
        let ancestors = place.below.ancestors();
        let levels = ancestors.map(|level| {
            let folder = place.mount.join(level);
            let file = |name: &str| KeptFile::new(folder.join(name));
            Level {
                path: std::path::Path::new("/").join(level).display().to_string(),
                limits: limits.iter().map(|name| file(name)).collect(),
                current: file(current),
                stat: file("memory.stat"),
            }
        });
        Self {
            levels: levels.collect(),
            place,
            text: Vec::new(),
        }
    }

    /// Returns where these levels are.
    pub(in crate::memory) fn place(&self) -> &Cgroup {
        &self.place
    }

    /// Reads every level. Returns the one that limits us most and its margin;
    /// `None` without any limit.
    pub(in crate::memory) fn read(&mut self) -> Option<(CgroupReading, Bytes)> {
        let (version, text) = (self.place.version, &mut self.text);
        let levels = self.levels.iter_mut();
        levels
            .filter_map(|level| level.read(version, text))
            .min_by_key(|(_, margin)| *margin)
    }
}

impl Level {
    fn read(&mut self, version: Version, text: &mut Vec<u8>) -> Option<(CgroupReading, Bytes)> {
        let limit = self
            .limits
            .iter_mut()
            .filter_map(|file| file.read_number(text))
            .filter(|limit| *limit < NO_LIMIT)
            .min()?;
        let current = Bytes(self.current.read_number(text)?);
        let stat = self.stat.read(text).unwrap_or_default();
        let working_set = current - version.droppable(stat);
        let limit = Bytes(limit);
        let reading = CgroupReading {
            version: version.number(),
            path: self.path.clone(),
            limit: Some(limit),
            current,
            working_set,
        };
        Some((reading, limit - working_set))
    }
}
