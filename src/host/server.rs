//! The host socket's thread: it serves the clients, and it is the daemon's clock.
//!
//! One epoll loop (event-manager) over the listener, the connections, the hub's wake-up and a timer
//! that is armed only while something waits for time to pass: an idle daemon does not wake up. No
//! client can hold it up: nothing here waits for one, and what takes its time has a thread of its own. A
//! client that goes away ends its leases and exports.

mod succession;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use log::{debug, error};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::conn::{Conn, Gone, Interest, TURN};
use super::heirs::{Heir, Heirs};
use super::jobs::Jobs;
use super::listener::Listener;
use super::packet::{self, Wait};
use super::request::{self, Answer, People, Person};
use super::wire::Type;
use crate::hub::Hub;
use crate::ids::ClientId;
use crate::ioctl::PeerCredentials;
use crate::limits::MAX_CLIENTS;
use crate::protocol::{NAME_LEN, Status};
use crate::throttle::Throttle;
use crate::throttled;

/// A client that took this long has had its turn.
const TURN_TIME: Duration = Duration::from_millis(2);
/// Pause between two looks for a free descriptor, or thread.
const RETRY: Duration = Duration::from_millis(100);
const LISTENER: u32 = 0;
const WAKE: u32 = 1;
const TIMER: u32 = 2;
const SUCCESSOR: u32 = 3;
const SIGNAL: u32 = 4;
const FENCES: u32 = 5;
const FIRST_CLIENT: u32 = 16;

/// Serves the host socket.
#[derive(Debug)]
pub struct Server {
    hub: Arc<Hub>,
    listener: Option<Listener>,
    timer: OwnedFd,
    timer_armed: bool,
    /// Given up for a moment when there is no descriptor left to accept a connection with.
    spare: Option<OwnedFd>,
    last_client: u64,
    /// By epoll token, with what the token waits for: nothing while the connection is busy.
    conns: BTreeMap<u32, (Conn, Option<Interest>)>,
    jobs: Jobs,
    people: People,
    heirs: Heirs,
    /// Everything was left to an heir, or could not be.
    over: Arc<Mutex<Option<io::Result<()>>>>,
    log: Throttle,
}

impl Server {
    /// A server of this hub. Without a listener it is the clock alone.
    pub fn new(hub: Arc<Hub>, listener: Option<Listener>) -> io::Result<Server> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let spare = Some(rustix::io::fcntl_dupfd_cloexec(&timer, 0)?);
        Ok(Server {
            hub,
            listener,
            timer,
            timer_armed: false,
            spare,
            last_client: 0,
            conns: BTreeMap::new(),
            jobs: Jobs::default(),
            people: People::new(),
            heirs: Heirs::default(),
            over: Arc::default(),
            log: Throttle::new(),
        })
    }

    /// Serves until everything was left to an heir.
    pub fn run(self) -> Result<(), Box<dyn std::error::Error>> {
        let over = self.over.clone();
        let mut manager = EventManager::new()?;
        manager.add_subscriber(self);
        loop {
            manager.run()?;
            if let Some(result) = over.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return result.map_err(|error| format!("not all could be left: {error}").into());
            }
        }
    }

    fn person(&self, peer: &PeerCredentials, name: [u8; NAME_LEN]) -> Person {
        let operator = self.listener.as_ref().is_some_and(|to| to.is_operator(peer.uid));
        Person { pid: peer.pid, name, operator }
    }

    /// Accepts who waits.
    fn accept(&mut self, ops: &mut EventOps) {
        for _ in 0..TURN {
            let Some(listener) = &self.listener else { return };
            let (socket, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return,
                    Some(Errno::MFILE | Errno::NFILE) => return self.turn_away(ops),
                    _ => {
                        throttled!(self.log, Warn, "a client could not be accepted: {error}");
                        return;
                    }
                },
            };
            let refused = if !listener.admits(peer.uid) {
                let (uid, pid) = (peer.uid, peer.pid);
                throttled!(self.log, Warn, "user {uid} (pid {pid}) is not served: --host-uid");
                Some(Status::Access)
            } else if self.conns.len() >= MAX_CLIENTS {
                let pid = peer.pid;
                throttled!(self.log, Warn, "pid {pid}: there are {MAX_CLIENTS} clients already");
                Some(Status::Quota)
            } else {
                None
            };
            if let Some(status) = refused {
                let last_words = request::refusal(Type::Hello.to_wire(), status, 0, 0);
                // Whether it reads them is its own business.
                let _ = packet::send(&socket, &last_words.bytes, None, Wait::Never);
                continue;
            }
            self.last_client += 1;
            let client = ClientId(self.last_client);
            let token = (FIRST_CLIENT..).find(|token| !self.conns.contains_key(token));
            let token = token.unwrap_or(FIRST_CLIENT);
            let events = Events::with_data(&socket, token, EventSet::IN);
            if let Err(error) = ops.add(events) {
                error!("a client cannot be watched: {error}");
                continue;
            }
            debug!("client {client}: pid {}, user {}", peer.pid, peer.uid);
            self.people.insert(client, self.person(&peer, [0; NAME_LEN]));
            let interest = Interest { read: true, write: false };
            self.conns.insert(token, (Conn::new(socket, client), Some(interest)));
        }
    }

    /// Without a free descriptor a waiting connection would keep the listener readable for ever.
    fn turn_away(&mut self, ops: &mut EventOps) {
        throttled!(self.log, Warn, "no descriptor left for another client: raise LimitNOFILE");
        self.spare = None;
        if let Some(listener) = &self.listener {
            drop(listener.accept());
        }
        self.spare = self.new_spare();
        if self.spare.is_none() {
            // Somebody else was faster: nobody can be turned away until it is back.
            self.listen_for(EventSet::empty(), ops);
        }
    }

    fn new_spare(&self) -> Option<OwnedFd> {
        rustix::io::fcntl_dupfd_cloexec(&self.timer, 0).ok()
    }

    fn listen_for(&self, set: EventSet, ops: &mut EventOps) {
        if let Some(listener) = &self.listener
            && let Err(error) = ops.modify(Events::with_data(&listener.as_fd(), LISTENER, set))
        {
            error!("the host socket is watched no more: {error}");
        }
    }

    /// A turn of requests of one client.
    fn serve(&mut self, token: u32) -> Result<(), Gone> {
        let started = Instant::now();
        for _ in 0..TURN {
            // One request may be a copy.
            if started.elapsed() > TURN_TIME {
                break;
            }
            let Some((conn, _)) = self.conns.get_mut(&token) else { break };
            let Some(answer) = conn.next_answer(&self.hub, &self.people)? else { break };
            if let (Some(name), Some(person)) = (conn.name(), self.people.get_mut(&conn.client())) {
                person.name = name;
            }
            self.spread_news();
            let Some((conn, _)) = self.conns.get_mut(&token) else { break };
            match answer {
                Answer::Now(answer) => conn.push(answer, &self.hub)?,
                Answer::Later => {}
                Answer::Job(job) => self.jobs.start(&self.hub, token, job),
            }
        }
        Ok(())
    }

    /// Hands out what jobs made.
    fn take_finished(&mut self, ops: &mut EventOps) {
        for (token, made) in self.jobs.take_done() {
            let Some((conn, _)) = self.conns.get_mut(&token) else { continue };
            if let Err(why) = conn.done(made, &self.hub) {
                self.drop_client(token, why, ops);
            }
        }
    }

    /// Gives each client what the hub has for it.
    fn spread_news(&mut self) {
        let news = self.hub.take_host_news();
        for (client, number, status, generation) in news.done {
            self.hub.metrics.answered_host(Some(Type::Sync), status);
            let conn = self.conns.values_mut().find(|(conn, _)| conn.client() == client);
            if let Some((conn, _)) = conn {
                conn.begun(number, status, generation);
            }
        }
        for (conn, _) in self.conns.values_mut() {
            if news.exporters.contains(&conn.client()) {
                conn.note_export();
            }
        }
        for notice in &news.notices {
            for (conn, _) in self.conns.values_mut() {
                conn.note(notice);
            }
        }
    }

    fn drop_client(&mut self, token: u32, why: Gone, ops: &mut EventOps) {
        let Some((conn, watched)) = self.conns.remove(&token) else { return };
        let client = conn.client();
        match why {
            Gone::Closed => debug!("client {client} is gone"),
            Gone::Broken(what) => {
                throttled!(self.log, Info, "client {client} broke the protocol: {what}");
            }
            Gone::Failed(error) => throttled!(self.log, Warn, "client {client} failed: {error}"),
        }
        if watched.is_some()
            && let Err(error) = ops.remove(Events::empty(&conn.as_fd()))
        {
            error!("client {client} is still watched: {error}");
        }
        self.people.remove(&client);
        // First its descriptors that are still on their way, then its leases and exports.
        drop(conn);
        self.hub.client_gone(client);
    }

    /// Sends what there is to send, sets the clock, and says what to wait for.
    fn settle(&mut self, ops: &mut EventOps) {
        let mut due = self.hub.tick();
        if self.spare.is_none() {
            self.spare = self.new_spare();
            if self.spare.is_some() {
                self.listen_for(EventSet::IN, ops);
            } else {
                due = Some(due.map_or(RETRY, |due| due.min(RETRY)));
            }
        }
        if self.jobs.go_on(&self.hub) {
            due = Some(due.map_or(RETRY, |due| due.min(RETRY)));
        }
        self.take_finished(ops);
        self.spread_news();
        let mut gone = Vec::new();
        for (token, (conn, waits_for)) in &mut self.conns {
            if conn.busy() {
                // Not even a hang-up: a client that is gone is noticed when its job is done.
                if waits_for.take().is_some()
                    && let Err(error) = ops.remove(Events::empty(&conn.as_fd()))
                {
                    error!("client {} is still watched: {error}", conn.client());
                }
                continue;
            }
            if conn.interest().write
                && let Err(why) = conn.write(&self.hub)
            {
                gone.push((*token, why));
                continue;
            }
            let interest = conn.interest();
            if Some(interest) != *waits_for {
                let events = Events::with_data(&conn.as_fd(), *token, set_of(interest));
                let watch = if waits_for.is_some() { ops.modify(events) } else { ops.add(events) };
                match watch {
                    Ok(()) => *waits_for = Some(interest),
                    Err(error) => error!("client {} is watched no more: {error}", conn.client()),
                }
            }
        }
        for (token, why) in gone {
            self.drop_client(token, why, ops);
        }
        self.arm(due);
    }

    fn arm(&mut self, due: Option<Duration>) {
        if due.is_none() && !self.timer_armed {
            return;
        }
        // Zero would disarm it.
        let due_in = due.map_or(Duration::ZERO, |due| due.max(Duration::from_nanos(1)));
        let value = Timespec {
            tv_sec: i64::try_from(due_in.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: due_in.subsec_nanos().into(),
        };
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            Ok(_) => self.timer_armed = due.is_some(),
            Err(error) => error!("the clock cannot be set: {error}"),
        }
    }
}

fn set_of(interest: Interest) -> EventSet {
    let mut set = EventSet::empty();
    set.set(EventSet::IN, interest.read);
    set.set(EventSet::OUT, interest.write);
    set
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps) {
        let listener = self.listener.as_ref().map(|listener| (listener.as_fd(), LISTENER));
        let sources = [
            (self.hub.host_wake().as_fd(), WAKE),
            (self.timer.as_fd(), TIMER),
            (self.hub.fence_wake(), FENCES),
        ];
        let (successor, signal) = self.heirs.sources();
        let heirs = [successor.map(|fd| (fd, SUCCESSOR)), signal.map(|fd| (fd, SIGNAL))];
        let all = sources.into_iter().chain(listener).chain(heirs.into_iter().flatten());
        let all = all.map(|(source, token)| (source, token, EventSet::IN));
        let clients = self
            .conns
            .iter()
            .filter_map(|(token, (conn, set))| Some((conn.as_fd(), *token, set_of((*set)?))));
        for (source, token, set) in all.chain(clients) {
            if let Err(error) = ops.add(Events::with_data(&source, token, set)) {
                error!("the host socket's thread is deaf: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.accept(ops),
            SUCCESSOR => {
                if let Some(heir) = self.heirs.successor() {
                    return self.leave(heir);
                }
            }
            SIGNAL => return self.leave(Heir::Manager),
            WAKE => self.hub.host_wake().consume(),
            FENCES => self.hub.fences_over(),
            TIMER => {
                // Nothing to read: it was set anew meanwhile.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            }
            token => {
                let readable = EventSet::IN | EventSet::HANG_UP | EventSet::ERROR;
                if events.event_set().intersects(readable)
                    && let Err(why) = self.serve(token)
                {
                    self.drop_client(token, why, ops);
                }
            }
        }
        self.settle(ops);
    }
}
