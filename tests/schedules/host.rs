//! The host: the host socket's thread as `host::server` runs it, the clock, and its clients.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::hub::{Hub, Memory};
use crate::ids::{ClientId, Cookie};
use crate::protocol::Status;
use crate::registry::Ended;
use crate::world::{self, Bell};

type Request = Box<dyn FnOnce(&Hub) + Send>;

/// A BEGIN's end, or nothing yet.
type Ends = BTreeMap<(ClientId, Cookie), Option<Status>>;

/// The host socket's thread.
pub struct Host {
    hub: Arc<Hub>,
    bell: Arc<Bell>,
    requests: Mutex<VecDeque<Request>>,
    ends: Mutex<Ends>,
    clients: Mutex<Vec<Arc<Bell>>>,
    armed: Mutex<Option<Duration>>,
    stop: AtomicBool,
}

impl Host {
    /// One that does not run yet.
    pub fn new(hub: &Arc<Hub>) -> Arc<Host> {
        let bell = Bell::new();
        hub.host_wake().watch(bell.clone());
        Arc::new(Host {
            hub: hub.clone(),
            bell,
            requests: Mutex::default(),
            ends: Mutex::default(),
            clients: Mutex::default(),
            armed: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    /// When its timer is due.
    pub fn armed(&self) -> Option<Duration> {
        *self.armed.lock().expect("no panic")
    }

    fn fences_are_over(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.hub.fence_wake(), PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&at_once)).expect("poll") > 0
    }

    /// A descriptor of the epoll set may be readable: its waiter wakes up.
    pub fn look_at_fences(&self) {
        if self.fences_are_over() {
            self.bell.ring();
        }
    }

    fn has_request(&self) -> bool {
        !self.requests.lock().expect("no panic").is_empty()
    }

    fn is_ready(&self) -> bool {
        let stop = self.stop.load(Ordering::SeqCst);
        stop || self.hub.host_wake().is_raised() || self.has_request() || self.fences_are_over()
    }

    /// Runs until the end.
    pub fn run(&self) {
        while !self.stop.load(Ordering::SeqCst) {
            self.bell.sleep(self.armed(), || self.is_ready());
            if !self.is_ready() {
                // It is time.
                self.settle();
                continue;
            }
            if self.hub.host_wake().is_raised() {
                self.hub.host_wake().consume();
                self.settle();
            }
            if self.fences_are_over() {
                self.hub.fences_over();
                self.settle();
            }
            let request = self.requests.lock().expect("no panic").pop_front();
            if let Some(request) = request {
                request(&self.hub);
                self.spread_news();
                self.settle();
            }
        }
        self.bell.retire();
    }

    /// Ends it.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    fn settle(&self) {
        let due = self.hub.tick();
        self.spread_news();
        *self.armed.lock().expect("no panic") = due.map(|due| world::now() + due);
    }

    fn spread_news(&self) {
        let news = self.hub.take_host_news();
        for (client, cookie, status, _) in news.done {
            let mut ends = self.ends.lock().expect("no panic");
            let end = ends.insert((client, cookie), Some(status));
            assert!(matches!(end, None | Some(None)), "a BEGIN of {client} ended twice");
        }
        let clients = self.clients.lock().expect("no panic").clone();
        clients.iter().for_each(|bell| bell.ring());
    }

    /// A client of its own thread.
    pub fn client(self: &Arc<Host>, id: ClientId) -> Client {
        let bell = Bell::new();
        self.clients.lock().expect("no panic").push(bell.clone());
        Client { id, host: self.clone(), bell }
    }
}

/// A program on the host.
pub struct Client {
    /// Its number.
    pub id: ClientId,
    /// Whose client it is.
    pub host: Arc<Host>,
    /// What it sleeps on.
    pub bell: Arc<Bell>,
}

impl Client {
    /// Has the host socket's thread do something, and waits for it.
    pub fn ask<T: Send + 'static>(&self, what: impl FnOnce(&Hub) -> T + Send + 'static) -> T {
        let answer: Arc<Mutex<Option<T>>> = Arc::new(Mutex::new(None));
        let (slot, bell) = (answer.clone(), self.bell.clone());
        let request = move |hub: &Hub| {
            let answer = what(hub);
            *slot.lock().expect("no panic") = Some(answer);
            bell.ring();
        };
        self.host.requests.lock().expect("no panic").push_back(Box::new(request));
        self.host.bell.ring();
        self.bell.sleep_until(|| answer.lock().expect("no panic").is_some());
        let answer = answer.lock().expect("no panic").take();
        answer.expect("an answer")
    }

    /// Copies, on a thread that is not the host socket's.
    pub fn finish_end(&self, ended: Ended<Memory>) -> Result<u64, Status> {
        self.host.hub.finish_end(ended)
    }

    /// Waits for the end of a BEGIN.
    pub fn ended(&self, cookie: Cookie) -> Status {
        let end =
            || self.host.ends.lock().expect("no panic").get(&(self.id, cookie)).copied().flatten();
        self.bell.sleep_until(|| end().is_some());
        end().expect("an end")
    }
}
