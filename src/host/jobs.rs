//! What clients ask for that may take its time: a thread for each job, besides the host socket's own.
//!
//! It does not know what a job does. There are no more of them than connections: each has one at most,
//! and stays as long as its job runs, also when its client is gone.

use std::sync::{Arc, Mutex};
use std::thread;

use super::request::{Job, Outgoing};
use crate::hub::{Hub, lock};
use crate::throttle::Throttle;
use crate::throttled;

/// What came of a job, and the connection that it is for.
type Done = (u32, Result<Outgoing, &'static str>);

/// Jobs that run, or that are done.
#[derive(Debug, Default)]
pub struct Jobs {
    done: Arc<Mutex<Vec<Done>>>,
    log: Throttle,
}

impl Jobs {
    /// Starts a job; the hub wakes the host socket's thread when it is done.
    pub fn start(&self, hub: &Arc<Hub>, token: u32, job: Job) {
        // Whoever takes it out runs it.
        let (job, hub, done) = (Arc::new(Mutex::new(Some(job))), hub.clone(), self.done.clone());
        let run = move || {
            let Some(job) = lock(&job).take() else { return };
            let made = job(&hub);
            lock(&done).push((token, made));
            hub.wake_host();
        };
        let here = run.clone();
        if let Err(error) = thread::Builder::new().name("host-job".to_owned()).spawn(run) {
            throttled!(self.log, Warn, "no thread for a client's request: {error}");
            here();
        }
    }

    /// Those that are done.
    pub fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut *lock(&self.done))
    }
}
