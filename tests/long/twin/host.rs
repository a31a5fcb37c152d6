//! What programs do: SYNC and points of their leases and of what they lend, and what they are told of that.

use std::fs::File;
use std::os::fd::AsFd;

use bufshare::host::client::{Event, Loan};
use bufshare::host::wire::FdKind;
use bufshare::protocol::{State, metadata};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::world::{Lent, Owner, World, pick, refusal};
use super::*;

/// A client, and a lease or export of it: the number that it knows, and the twin's.
pub type Number = (usize, u64, LeaseId);

/// What clients know of what they lend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Known {
    busy: BTreeSet<Uuid>,
    generations: BTreeMap<Uuid, u64>,
    released: Vec<Uuid>,
}

#[derive(Debug, Default)]
pub struct Told {
    real: Known,
    twin: Known,
}

impl Known {
    fn forget(&mut self, uuid: Uuid) {
        self.busy.remove(&uuid);
        self.generations.remove(&uuid);
        self.released.retain(|other| *other != uuid);
    }

    fn hear(&mut self, kind: EventKind, uuid: Uuid, generation: u64) {
        match kind {
            EventKind::Released => {
                self.forget(uuid);
                self.released.push(uuid);
                self.released.sort_unstable();
            }
            EventKind::Busy => drop(self.busy.insert(uuid)),
            EventKind::Idle => drop(self.busy.remove(&uuid)),
            EventKind::Changed => drop(self.generations.insert(uuid, generation)),
            other => panic!("{other:?} of what a client lends"),
        }
    }
}

impl Told {
    /// Whose client is gone.
    pub fn forget(&mut self, gone: impl Iterator<Item = Uuid>) {
        for uuid in gone {
            self.real.forget(uuid);
            self.twin.forget(uuid);
        }
    }
}

impl World<'_> {
    pub fn lend(&mut self, client: usize, size: u64, access: Access) {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("lent", flags).expect("memfd"));
        ftruncate(&file, size).expect("memfd");
        fcntl_add_seals(&file, SealFlags::SHRINK).expect("seals");
        let bits = access.bits();
        let loan =
            Loan { size, access: bits, name: "", metadata_type: metadata::NONE, metadata: &[] };
        let real = self.clients[client].export(&file, &loan).expect("EXPORT");
        let (name, metadata_type) = ([0; NAME_LEN], metadata::NONE);
        let what = Description { size, access, name, metadata_type, metadata: Box::default() };
        let number = self.numbers[client];
        let ticket = self.twin.begin_client_export(number, what, false).expect("EXPORT");
        // A memfd that is wrapped.
        let observable = real.fd_kind == FdKind::DmaBuf;
        let (mode, uuid, shows, since) = (Mode::ZeroCopy, real.uuid, observable, self.now);
        let memory = self.fresh(size);
        let made = Exported { backing: memory.clone(), mode, uuid, observable, shows, since };
        let (twin, _) = self.twin.finish_client_export(ticket, Ok(made)).expect("it was made");
        let mapping = Mapping::new(file.as_fd(), size as usize, true).expect("mmap");
        let memory = (size, mapping, memory);
        self.exports.push(Lent::of_client(client, (real.handle, twin), uuid, memory));
    }

    /// RELEASE of an export.
    pub fn take_back(&mut self, owner: Owner, (handle, twin): (u64, HandleId), force: bool) {
        let Owner::Client(client) = owner else { return };
        let real = self.clients[client].take_back(handle, force).or_else(refusal);
        let number = LeaseId(twin.0);
        let twin = self.twin.release_of(self.numbers[client], number, force);
        assert_eq!(real, twin.map(|(state, _)| state == State::Released));
    }

    /// Of a lease, or of what a client lends.
    pub fn program(&self, who: Who, at: usize) -> Option<Number> {
        match who {
            Who::Exporter => {
                let lent = pick(&self.exports, at)?;
                let Owner::Client(client) = lent.owner else { return None };
                Some((client, lent.handle, LeaseId(lent.twin.0)))
            }
            Who::Lease => {
                let lease = pick(&self.leases, at)?;
                Some((lease.client, lease.real.as_ref()?.id, lease.twin))
            }
            Who::Attachment => None,
        }
    }

    fn cookie(&mut self) -> Cookie {
        Cookie(u32::try_from(self.token()).expect("a short script"))
    }

    /// SIGNAL or WAIT; what was reached by a signal.
    pub fn host_point(
        &mut self,
        (client, real, twin): Number,
        (line, point): (Line, u64),
        signal: Option<Status>,
    ) -> u64 {
        let number = self.numbers[client];
        if let Some(status) = signal {
            let real = self.clients[client].signal(real, line, point, status).or_else(refusal);
            let twin = self.twin.signal_lease(number, twin, Signal { line, point, status });
            assert_eq!(real, twin, "SIGNAL");
            return twin.unwrap_or(0);
        }
        let cookie = self.cookie();
        let wait = PointWait { line, point, timeout: LONG, cookie };
        let real = self.clients[client].submit_wait(real, line, point, LONG).expect("sent");
        // What is behind it is answered when it waits.
        self.clients[client].stats().expect("STATS");
        self.begun.insert((number, cookie), (client, real, true));
        match self.twin.wait_lease(number, twin, wait, false, self.now) {
            Ok(Begun::Waits) => {}
            Ok(Begun::Now(reached)) => self.host_ended(number, cookie, Ok(reached)),
            Err(status) => self.host_ended(number, cookie, Err(status)),
        }
        0
    }

    /// A BEGIN or WAIT of a client ended.
    pub fn host_ended(&mut self, number: ClientId, cookie: Cookie, twin: Result<u64, Status>) {
        let Some((client, real, point)) = self.begun.remove(&(number, cookie)) else { return };
        if self.numbers[client] != number {
            return;
        }
        let client = &mut self.clients[client];
        let mut answer = None;
        wait_for(patience(), || {
            client.dispatch().expect("the daemon lives");
            answer = match point {
                true => client.take_reached(real).transpose(),
                false => client.take_generation(real).transpose(),
            };
            answer.is_some()
        });
        let real = answer.expect("an answer to BEGIN or WAIT");
        assert_eq!(real.or_else(refusal), twin, "BEGIN or WAIT of a client");
    }

    pub fn host_cancel(&mut self, at: usize) {
        let begun: Vec<_> = self.begun.iter().map(|(name, value)| (*name, *value)).collect();
        let Some(((number, cookie), (client, real, _))) = pick(&begun, at).copied() else { return };
        if self.numbers[client] != number {
            return;
        }
        let real = self.clients[client].cancel(real).or_else(refusal);
        assert_eq!(real, self.twin.cancel_client(number, cookie), "CANCEL of a client");
    }

    /// BEGIN or END.
    pub fn host_sync(
        &mut self,
        (client, real, twin): Number,
        begin: bool,
        bits: Access,
        nonblock: bool,
    ) {
        if bits.is_none() {
            return;
        }
        let number = self.numbers[client];
        let range = client::Access { bits: bits.bits(), offset: 0, len: 0 };
        let (offset, len, timeout, cookie) = (0, 0, LONG, self.cookie());
        let nonblock = nonblock && begin;
        let sync = SyncRequest { bits, offset, len, nonblock, timeout, cookie };
        let client_of = &mut self.clients[client];
        if !begin {
            let real = client_of.end(real, range).or_else(refusal);
            let twin = self.twin.end_access(number, twin, sync);
            let twin = twin.map(|ended| self.finish(ended));
            return assert_eq!(real, twin, "END of a client");
        }
        let begun = self.twin.begin_lease(number, twin, sync, false, self.now);
        match begun {
            Ok(Begun::Waits) => {
                let real = client_of.submit_begin(real, range, LONG).expect("sent");
                self.begun.insert((number, cookie), (client, real, false));
            }
            Ok(Begun::Now(_)) | Err(_) => {
                let real = match nonblock {
                    true => client_of.try_begin(real, range),
                    false => client_of.begin(real, range, LONG),
                };
                let begun = begun.map(|begun| match begun {
                    Begun::Now(generation) => generation,
                    Begun::Waits => unreachable!("that was the other case"),
                });
                assert_eq!(real.or_else(refusal), begun, "BEGIN of a client");
            }
        }
    }

    /// Clients know the same of what they lend. How many events it took to tell them is their own affair.
    pub fn compare_told(&mut self) {
        for number in &self.numbers {
            while let Some(event) = self.twin.take_export_event(*number) {
                self.told.twin.hear(event.kind, event.info.uuid, event.info.generation);
            }
        }
        let (told, clients) = (&mut self.told, &mut self.clients);
        wait_for(patience(), || {
            for client in clients.iter_mut() {
                client.dispatch().expect("the daemon lives");
                while let Some(event) = client.take_event() {
                    match event {
                        Event::Busy(of) => told.real.hear(EventKind::Busy, of.uuid, 0),
                        Event::Idle(of) => told.real.hear(EventKind::Idle, of.uuid, 0),
                        Event::Changed(of) => {
                            told.real.hear(EventKind::Changed, of.uuid, of.generation);
                        }
                        Event::Released { uuid } => told.real.hear(EventKind::Released, uuid, 0),
                        other => panic!("{other:?} for who watches nothing"),
                    }
                }
            }
            told.real == told.twin
        });
        assert_eq!(told.real, told.twin, "what clients know of what they lend");
    }
}
