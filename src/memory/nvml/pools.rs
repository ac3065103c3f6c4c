//! Which places with memory of their own the driver knows, and their numbers.

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

/// A GPU, or one MIG instance of it: a place with its own memory.
pub(super) struct Pool<'nvml> {
    /// The GPU's place in the driver's order.
    gpu: u32,
    /// Why there is no handle, for a GPU that was lost before it was seen.
    pub(super) device: Result<Device<'nvml>, NvmlError>,
    pub(super) uuid: String,
    pub(super) name: String,
}

/// Lists all pools anew. A GPU that answers with an error keeps the pools it
/// had, so that one that is lost neither hides the others nor moves them to
/// other numbers.
pub(super) fn list_pools<'nvml>(
    nvml: &'nvml Nvml,
    mut known: Vec<Pool<'nvml>>,
) -> Result<Vec<Pool<'nvml>>, NvmlError> {
    let mut pools = Vec::new();
    for gpu in 0..nvml.device_count()? {
        let old: Vec<_> = known.extract_if(.., |pool| pool.gpu == gpu).collect();
        match pools_of(nvml, gpu) {
            Ok(found) => pools.extend(found),
            Err(_) if !old.is_empty() => pools.extend(old),
            // A GPU that this container was not given.
            Err(NvmlError::NoPermission | NvmlError::NotFound) => {}
            Err(error) => pools.push(Pool {
                gpu,
                device: Err(error),
                uuid: String::new(),
                name: String::new(),
            }),
        }
    }
    Ok(pools)
}

/// Returns the MIG instances of a GPU that is divided into some, else the GPU.
fn pools_of<'nvml>(nvml: &'nvml Nvml, gpu: u32) -> Result<Vec<Pool<'nvml>>, NvmlError> {
    let device = nvml.device_by_index(gpu)?;
    let name = unless_lost(device.name())?;
    let mut parts = list_instances(&device)?;
    if parts.is_empty() {
        parts.push(device);
    }
    let pool = |device: Device<'nvml>| {
        Ok(Pool {
            gpu,
            uuid: unless_lost(device.uuid())?,
            name: name.clone(),
            device: Ok(device),
        })
    };
    parts.into_iter().map(pool).collect()
}

fn list_instances<'nvml>(device: &Device<'nvml>) -> Result<Vec<Device<'nvml>>, NvmlError> {
    let mode = match device.mig_mode() {
        // Who is given instances only may not ask their GPU whether it has any.
        Err(NvmlError::NoPermission) => 1,
        mode => unless_lost(mode.map(|mode| mode.current))?,
    };
    if mode == 0 {
        return Ok(Vec::new());
    }
    let mut instances = Vec::new();
    // The count is of places, not of instances; empty places answer an error.
    for index in 0..unless_lost(device.mig_device_count())? {
        instances.extend(unless_lost(device.mig_device_by_index(index).map(Some))?);
    }
    Ok(instances)
}

/// Returns what a device tells of itself, or nothing where it cannot. One that
/// is lost tells nothing right.
fn unless_lost<T: Default>(told: Result<T, NvmlError>) -> Result<T, NvmlError> {
    match told {
        Err(NvmlError::GpuLost) => told,
        _ => Ok(told.unwrap_or_default()),
    }
}
