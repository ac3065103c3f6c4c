//! `POST /api/v1/memory/limit`: sets or reports the limit of host RAM or of a
//! GPU.

use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use serde::Serialize;

use super::ApiState;
use super::envelope::{ApiError, success};
use super::query::{Params, bad_value};
use crate::control::{LimitReport, LimitRequest};
use crate::memory::DeviceReading;
use crate::model::{Bytes, Domain};

/// Answers `POST /limit`.
pub(crate) async fn limit(State(state): State<ApiState>, uri: Uri) -> Result<Response, ApiError> {
    let mut params = Params::of(&uri)?;
    let limit = params
        .text("limit_gb")
        .as_deref()
        .map(parse_gb)
        .transpose()?;
    let device = params.text("device");
    let persist = params.flag("persist", false)?;
    params.finish()?;
    if persist && limit.is_none() {
        return Err(ApiError::BadRequest(
            "persist needs limit_gb: there is nothing to keep".to_owned(),
        ));
    }
    let domain = match device {
        None => Domain::Host,
        Some(text) => {
            let snapshot = state.controller.snapshot();
            find_domain(&text, &snapshot.memory.reading.devices)?
        }
    };
    let request = LimitRequest {
        domain,
        limit,
        persist,
    };
    let report = state.controller.limit(request).await?;
    Ok(success(&Limited::of(&request, &report)))
}

/// Parses GB of 1024³ bytes.
fn parse_gb(text: &str) -> Result<Bytes, ApiError> {
    let wrong = || {
        bad_value(
            "limit_gb",
            &format_args!("{text:?}"),
            "a finite number of GB above zero",
        )
    };
    let gb: f64 = text.trim().parse().map_err(|_| wrong())?;
    let bytes = gb * Bytes::gib(1).as_f64();
    if !gb.is_finite() || bytes < 1.0 {
        return Err(wrong());
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at least one byte by the check above; more than any machine has saturates"
    )]
    Ok(Bytes(bytes as u64))
}

/// Finds the domain that `host`, `gpu:0`, `0` or a UUID names.
fn find_domain(text: &str, devices: &[DeviceReading]) -> Result<Domain, ApiError> {
    if text == "host" {
        return Ok(Domain::Host);
    }
    let index = text
        .strip_prefix("gpu:")
        .unwrap_or(text)
        .parse::<u32>()
        .ok();
    devices
        .iter()
        .find(|device| Some(device.index) == index || device.uuid == text)
        .map(|device| Domain::Gpu(device.index))
        .ok_or_else(|| ApiError::UnknownDevice(text.to_owned()))
}

#[derive(Debug, Serialize)]
struct Limited {
    memory_limit: u64,
    formatted_limit: String,
    current_usage: u64,
    formatted_usage: String,
    message: String,
    effective_limit: u64,
    formatted_effective_limit: String,
    device: String,
}

impl Limited {
    fn of(request: &LimitRequest, report: &LimitReport) -> Self {
        Self {
            memory_limit: report.limit.get(),
            formatted_limit: report.limit.formatted(),
            current_usage: report.usage.get(),
            formatted_usage: report.usage.formatted(),
            message: message(request, report),
            effective_limit: report.effective.get(),
            formatted_effective_limit: report.effective.formatted(),
            device: request.domain.to_string(),
        }
    }
}

fn message(request: &LimitRequest, report: &LimitReport) -> String {
    let what = match request.domain {
        Domain::Host => "memory limit".to_owned(),
        Domain::Gpu(_) => format!("memory limit of {}", request.domain),
    };
    let verb = match (request.limit, request.persist) {
        (None, _) => "is",
        (Some(_), false) => "set to",
        (Some(_), true) => "set, also for later starts, to",
    };
    let mut text = format!("{what} {verb} {}", report.limit.formatted());
    if report.effective < report.limit {
        text.push_str("; this machine gives at most ");
        text.push_str(&report.effective.formatted());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GpuVendor;

    #[test]
    fn a_limit_is_a_finite_number_above_zero() {
        let bytes = |text| parse_gb(text).ok();
        assert_eq!(bytes("4.0"), Some(Bytes::gib(4)));
        assert_eq!(bytes(" 0.5 "), Some(Bytes::mib(512)));
        assert_eq!(bytes("1e2"), Some(Bytes::gib(100)));
        assert_eq!(bytes("1e300"), Some(Bytes::MAX));
        for bad in [
            "0", "-0", "-1", "nan", "NaN", "inf", "-inf", "infinity", "", "four", "4GB", "0x4",
            "1e-300", "1e999",
        ] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_device_is_named_by_index_or_uuid() {
        let device = |index, uuid: &str| DeviceReading {
            index,
            uuid: uuid.to_owned(),
            name: "GPU".to_owned(),
            total: None,
            used: None,
            free: None,
            vendor: GpuVendor::Nvidia,
            unified: false,
            source: "nvml",
        };
        let devices = [device(0, "GPU-a"), device(1, "GPU-b")];
        let find = |text| find_domain(text, &devices).ok();
        assert_eq!(find("host"), Some(Domain::Host));
        assert_eq!(find("gpu:1"), Some(Domain::Gpu(1)));
        assert_eq!(find("0"), Some(Domain::Gpu(0)));
        assert_eq!(find("GPU-b"), Some(Domain::Gpu(1)));
        for unknown in ["2", "gpu:2", "GPU-c", "", "gpu:", "-1"] {
            assert_eq!(find(unknown), None, "{unknown}");
        }
    }
}
