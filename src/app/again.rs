//! Polls a future that woke itself once more at once.
//!
//! hyper's connection wakes itself as it hands a body from its reading half to the
//! one who answers, twice for each request. The runtime would put the connection
//! behind all others and wake another thread to take it from there, which costs more
//! than to go on. So what it wakes while it is polled is noted here, and it is
//! polled again.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Polls in a row at most: others have their turn then.
const MOST: usize = 6;

const IDLE: u8 = 0;
const POLLED: u8 = 1;
const WOKEN: u8 = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Again<F> {
    inner: F,
    bell: Arc<Bell>,
    waker: Waker,
}

/// What the future is given to wake.
#[derive(Debug)]
struct Bell {
    state: AtomicU8,
    task: AtomicWaker,
}

impl<F> Again<F> {
    pub(super) fn new(inner: F) -> Self {
        let bell = Arc::new(Bell {
            state: AtomicU8::new(IDLE),
            task: AtomicWaker::new(),
        });
        let waker = Waker::from(Arc::clone(&bell));
        Self { inner, bell, waker }
    }

    /// Returns what is polled.
    pub(super) fn inner(&mut self) -> &mut F {
        &mut self.inner
    }
}

impl<F: Future + Unpin> Future for Again<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        this.bell.task.register(cx.waker());
        for _ in 0..MOST {
            this.bell.state.store(POLLED, Ordering::SeqCst);
            let polled = Pin::new(&mut this.inner).poll(&mut Context::from_waker(&this.waker));
            if polled.is_ready() {
                return polled;
            }
            let (from, to) = (POLLED, IDLE);
            let state = &this.bell.state;
            let slept = state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
            if slept.is_ok() {
                return Poll::Pending;
            }
        }
        this.bell.state.store(IDLE, Ordering::SeqCst);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(WOKEN, Ordering::SeqCst) == IDLE {
            self.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Polls a future that wakes itself so often before it is ready. Returns whether
    /// it was, how often it was polled, and how often its task was woken.
    fn poll_once(wakes: usize) -> (bool, usize, usize) {
        let counter = Arc::new(Counter::default());
        let waker = Waker::from(Arc::clone(&counter));
        let mut polls = 0;
        let inner = poll_fn(|cx| {
            polls += 1;
            if polls > wakes {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        let mut again = Again::new(Box::pin(inner));
        let polled = Pin::new(&mut again).poll(&mut Context::from_waker(&waker));
        drop(again);
        (polled.is_ready(), polls, counter.0.load(Ordering::SeqCst))
    }

    #[test]
    fn who_wakes_himself_goes_on_at_once_but_not_for_ever() {
        assert_eq!(poll_once(0), (true, 1, 0));
        assert_eq!(poll_once(2), (true, 3, 0));
        assert_eq!(poll_once(100), (false, MOST, 1));
    }

    #[test]
    fn who_is_woken_by_another_is_polled_by_its_task_and_no_wake_is_lost() {
        let runtime = tokio::runtime::Builder::new_multi_thread().build();
        let runtime = runtime.expect("a runtime");
        for _ in 0..200 {
            let (sender, mut receiver) = tokio::sync::mpsc::channel::<u32>(1);
            let sending = std::thread::spawn(move || {
                for number in 0..200 {
                    sender.blocking_send(number).expect("it is heard");
                }
            });
            let mut heard = 0;
            let receiving = Again::new(Box::pin(async {
                while let Some(number) = receiver.recv().await {
                    assert_eq!(number, heard);
                    heard += 1;
                }
            }));
            runtime.block_on(receiving);
            sending.join().expect("it sent all");
            assert_eq!(heard, 200);
        }
    }
}
