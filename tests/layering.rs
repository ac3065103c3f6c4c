//! The layer map.
