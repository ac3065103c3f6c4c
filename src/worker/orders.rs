//! Waiting for what the controller wants of a worker.

use tokio::sync::watch;

use super::{Residence, Stop};

/// Waits until the worker is to stop.
pub(super) async fn stopped(stop: &mut watch::Receiver<Stop>) {
    wait_for(stop, Stop::Graceful).await;
}

/// Waits until the worker is to be killed.
pub(super) async fn killed(stop: &mut watch::Receiver<Stop>) {
    wait_for(stop, Stop::Kill).await;
}

/// Waits until the worker is ordered to park, or to be ready again.
pub(super) async fn ordered(residence: &mut watch::Receiver<Residence>) -> Residence {
    if residence.changed().await.is_err() {
        // Whoever could order it is gone: then nobody will.
        std::future::pending::<()>().await;
    }
    *residence.borrow_and_update()
}

async fn wait_for(stop: &mut watch::Receiver<Stop>, least: Stop) {
    if stop.wait_for(|how| *how >= least).await.is_err() {
        // Whoever could order it is gone: then nobody will.
        std::future::pending::<()>().await;
    }
}

/// Waits until nobody is left who could order anything: another residentd has
/// taken over.
pub(super) async fn let_go(stop: &mut watch::Receiver<Stop>) {
    while stop.changed().await.is_ok() {}
}
