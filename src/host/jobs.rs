//! What clients ask for that may take its time: a thread for each job, besides the host socket's own.
//!
//! It does not know what a job does. There are no more of them than connections: each has one at most,
//! and stays as long as its job runs, also when its client is gone. Where no thread can be made a job
//! waits: nothing else could run it without being held up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::{fmt, io, thread};

use super::request::{Job, Outgoing};
use crate::hub::{Hub, lock};
use crate::throttle::Throttle;
use crate::throttled;

/// What came of a job, and the connection that it is for.
type Done = (u32, Result<Outgoing, &'static str>);

/// Jobs that run, that wait for a thread, or that are done.
#[derive(Default)]
pub struct Jobs {
    waiting: VecDeque<(u32, Job)>,
    done: Arc<Mutex<Vec<Done>>>,
    log: Throttle,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

impl Jobs {
    /// Starts a job, now or later; the hub wakes the host socket's thread when it is done.
    pub fn start(&mut self, hub: &Arc<Hub>, token: u32, job: Job) {
        self.waiting.push_back((token, job));
        self.go_on(hub);
    }

    /// Starts what waits, in its order. Returns whether a job still does: ask again in a moment.
    pub fn go_on(&mut self, hub: &Arc<Hub>) -> bool {
        let spawn = |run| thread::Builder::new().name("host-job".to_owned()).spawn(run).map(drop);
        self.start_by(hub, spawn)
    }

    fn start_by(
        &mut self,
        hub: &Arc<Hub>,
        spawn: impl Fn(Box<dyn FnOnce() + Send>) -> io::Result<()>,
    ) -> bool {
        while let Some((token, job)) = self.waiting.pop_front() {
            // A thread that is not made does not give it back.
            let job = Arc::new(Mutex::new(Some(job)));
            let (taken, hub, done) = (job.clone(), hub.clone(), self.done.clone());
            let started = spawn(Box::new(move || {
                let Some(job) = lock(&taken).take() else { return };
                let made = job(&hub);
                lock(&done).push((token, made));
                hub.wake_host();
            }));
            if let Err(error) = started {
                throttled!(self.log, Warn, "no thread for a client's request: {error}");
                self.waiting.extend(lock(&job).take().map(|job| (token, job)));
                self.waiting.rotate_right(1);
                return true;
            }
        }
        false
    }

    /// Those that are done.
    pub fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut *lock(&self.done))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dmabuf::{DmaBufs, Source};
    use crate::policy::Policy;

    #[test]
    fn without_a_thread_a_job_waits() {
        let dmabufs = DmaBufs::new(&Source::Off, false).unwrap();
        let hub = Arc::new(Hub::new(&[], Policy::new(Vec::new()), dmabufs).unwrap());
        let mut jobs = Jobs::default();
        let here = thread::current().id();
        for token in [3, 5] {
            let job = move |_: &Hub| {
                assert_ne!(thread::current().id(), here, "on the clock's thread");
                Err("done")
            };
            jobs.waiting.push_back((token, Box::new(job)));
        }
        let none = || io::Error::from_raw_os_error(libc::EAGAIN);
        for _ in 0..3 {
            assert!(jobs.start_by(&hub, |_| Err(none())));
            assert!(jobs.take_done().is_empty());
        }
        let joined = |run: Box<dyn FnOnce() + Send>| {
            thread::spawn(run).join().expect("no panic");
            Ok(())
        };
        assert!(!jobs.start_by(&hub, joined));
        let done: Vec<u32> = jobs.take_done().into_iter().map(|(token, _)| token).collect();
        assert_eq!(done, [3, 5], "in their order");
    }
}
