//! Windows: what guests ask of them, and the twin's own VMMs, which do at once what the fake ones of the
//! guests do in their own time.
//!
//! A VMM that holds a request back is the one moment of a script at which something is under way.

use std::collections::VecDeque;

use bufshare::ids::{WindowId, WindowRange};
use bufshare::limits::{DEFAULT_WINDOW, GRANULE};
use bufshare::protocol::{Resp, RespMap};
use bufshare::registry::{Answer, Settled, Shown, WindowRequest};
use bufshare::window::Todo;

use super::world::{Memory, World, bury, pick, status};
use super::*;
use crate::common::unmap_request;

/// What a place of a window shows: how many bytes, of what, from which byte on.
type Seen = (u64, Rc<Memory>, u64);

/// A window and its VMM, as the twin has them.
pub struct Windowed {
    pub vmms: Vmms,
    id: WindowId,
    manner: Manner,
    holds: bool,
    /// What it was asked while it holds everything back.
    held: Option<Todo<Shown<Rc<Memory>>>>,
    /// It closed the channel.
    closed: bool,
    shown: BTreeMap<u64, Seen>,
    /// MAPs and UNMAPs that wait, by token, with their heads.
    parked: BTreeMap<u64, u16>,
    /// What has to come of the control queue: a MAP's mapping, or nothing of an UNMAP.
    due: VecDeque<(u16, Result<Option<MappingId>, Status>)>,
    maps: HashMap<u16, bool>,
}

impl Windowed {
    pub fn new(vmms: Vmms) -> Windowed {
        Windowed {
            vmms,
            id: WindowId(0),
            manner: Manner::Obliging,
            holds: false,
            held: None,
            closed: false,
            shown: BTreeMap::new(),
            parked: BTreeMap::new(),
            due: VecDeque::new(),
            maps: HashMap::new(),
        }
    }

    /// The guest's memory and, from who echoes, what its window shows.
    fn table(&self, vm: usize) -> Vec<(FileId, u64, u64)> {
        let ram = (FileId { dev: 2, ino: vm as u64 }, 0, PAGES * PAGE);
        let echo = |(len, memory, from): &Seen| (memory.file, *from, *len);
        let echoes = self.shown.values().filter(|_| self.vmms == Vmms::Echo).map(echo);
        std::iter::once(ram).chain(echoes).collect()
    }

    /// What the guest sees there, from the start of a place on.
    fn bytes(&self, at: u64) -> Vec<u8> {
        let (len, memory, from) = &self.shown[&at];
        let (ram, place) = memory.place(View::Content, *from);
        ram.borrow()[place..place + *len as usize].to_vec()
    }
}

impl World<'_> {
    /// A guest connected.
    pub fn open_window(&mut self, vm: usize) {
        if self.windows[vm].vmms != Vmms::None {
            self.windows[vm].id = self.twin.open_window(PEERS[vm], DEFAULT_WINDOW);
        }
        self.twin.memory_changed(PEERS[vm], &self.windows[vm].table(vm));
    }

    /// Its VMM is gone, and with it what it was like.
    pub fn close_window(&mut self, vm: usize) {
        self.windows[vm] = Windowed::new(self.windows[vm].vmms);
        self.twin.close_window(PEERS[vm]);
    }

    /// Chains of a guest that starts anew do not come back.
    pub fn forget_shown(&mut self, vm: usize) {
        self.windows[vm].parked.clear();
        self.windows[vm].maps.clear();
    }

    /// MAP into the window.
    pub fn show(&mut self, at: usize, offset: u64, (page, pages): (u64, u64), access: Access) {
        let Some((vm, handle)) = pick(&self.attachments, at).copied() else { return };
        let (offset, len, start) = (offset * PAGE, pages * PAGE, page * PAGE);
        let bits = access.bits();
        let map = Map { flags: 0, handle, offset, access: bits, len: Some(len), ..Map::default() };
        let map = Map { shm_offset: start, ..map };
        let head = self.guests[vm].control_start::<RespMap>(&map.bytes());
        self.windows[vm].maps.insert(head, true);
        let (handle, range) = (HandleId(handle), WindowRange { start, len });
        let request = WindowRequest { handle, offset, range, access };
        let token = self.token();
        let asked = match self.windows[vm].vmms {
            Vmms::None => Err(Status::Unsupp),
            Vmms::Echo | Vmms::Mute => self.ask_to_show(vm, request, token),
        };
        match asked {
            Ok(None) => drop(self.windows[vm].parked.insert(token, head)),
            now => self.windows[vm].due.push_back((head, now)),
        }
    }

    /// As `execute` does it.
    fn ask_to_show(
        &mut self,
        vm: usize,
        request: WindowRequest,
        token: u64,
    ) -> Result<Option<MappingId>, Status> {
        let session = self.sessions[vm];
        if let Some(mapping) = self.twin.ride(session, request)? {
            return Ok(Some(mapping));
        }
        let (ticket, shared) = self.twin.begin_window(session, request)?;
        let memory = shared.unwrap_or_else(|| self.fresh(request.range.len));
        let file = memory.file;
        self.twin.finish_window(ticket, Ok((memory, file)), token).map(|()| None)
    }

    pub fn unmap(&mut self, mapping: usize) {
        let Some((vm, mapping)) = pick(&self.mappings, mapping).copied() else { return };
        let head = self.guests[vm].control_start::<Resp>(&unmap_request(mapping));
        self.windows[vm].maps.insert(head, false);
        let token = self.token();
        match self.twin.unmap(self.sessions[vm], MappingId(mapping), token) {
            Ok(false) => drop(self.windows[vm].parked.insert(token, head)),
            done => self.windows[vm].due.push_back((head, done.map(|_| None))),
        }
        bury(&mut self.mappings, |one| *one == (vm, mapping));
    }

    /// The guest writes a page of its window.
    pub fn write_window(&mut self, vm: usize, at: usize, byte: u8) {
        let shown: Vec<u64> = self.windows[vm].shown.keys().copied().collect();
        let Some(start) = pick(&shown, at).copied() else { return };
        self.guests[vm].window().write(start, &vec![byte; PAGE as usize]);
        let (_, memory, from) = &self.windows[vm].shown[&start];
        let (ram, place) = memory.place(View::Content, *from);
        ram.borrow_mut()[place..place + PAGE as usize].fill(byte);
    }

    pub fn hold(&mut self, vm: usize, holds: bool) {
        if let Some(vmm) = &self.guests[vm].vmm {
            vmm.hold(holds);
            self.windows[vm].holds = holds;
        }
    }

    pub fn behave(&mut self, vm: usize, manner: Manner) {
        let window = &mut self.windows[vm];
        // Who does not echo is asked for a page there and back: one that stays would be in the way of the
        // next.
        if window.vmms == Vmms::None || (window.vmms, manner) == (Vmms::Mute, Manner::Keeps) {
            return;
        }
        window.manner = manner;
        let echo = window.vmms == Vmms::Echo;
        self.guests[vm].window().behave(Behaviour { manner, echo, ..Default::default() });
    }

    /// Asks the VMM what there is to ask, until nothing is left.
    pub fn ask(&mut self, vm: usize) {
        let (peer, id) = (PEERS[vm], self.windows[vm].id);
        while !self.windows[vm].closed {
            let todo = self.windows[vm].held.take();
            let todo = todo.or_else(|| self.twin.next_for_vmm(peer, id, self.now));
            let Some(todo) = todo else {
                let Some(until) = self.twin.vmm_deadline(peer, id) else { return };
                self.now = self.now.max(until);
                continue;
            };
            if self.windows[vm].holds {
                return self.windows[vm].held = Some(todo);
            }
            let answer = self.windows[vm].answer(todo);
            let now = self.now;
            self.windows[vm].closed = answer == Answer::Broken;
            self.twin.vmm_answered(peer, id, answer, now);
            if self.windows[vm].vmms == Vmms::Echo {
                self.twin.memory_changed(peer, &self.windows[vm].table(vm));
            }
        }
    }

    /// A MAP or UNMAP that waited has ended.
    pub fn settle(&mut self, settled: &Settled) {
        let vm = settled.peer.0 as usize - 2;
        let Some(head) = self.windows[vm].parked.remove(&settled.token) else { return };
        let answer = match settled.status {
            Status::Ok => Ok(settled.mapping),
            status => Err(status),
        };
        self.windows[vm].due.push_back((head, answer));
    }

    /// What guests are told of their MAPs and UNMAPs.
    pub fn answers_of_vmm(&mut self, vm: usize) {
        while let Some((head, twin)) = self.windows[vm].due.pop_front() {
            let guest = &mut self.guests[vm];
            let real = match self.windows[vm].maps.remove(&head).expect("a request") {
                true => {
                    let reply = guest.control_late::<RespMap>(head, patience());
                    reply.map(|reply| status(reply).map(|map| Some(MappingId(map.mapping.get()))))
                }
                false => {
                    let reply = guest.control_late::<Resp>(head, patience());
                    reply.map(|reply| status(reply).map(|_| None))
                }
            };
            assert_eq!(real.expect("an answer to MAP or UNMAP"), twin, "MAP or UNMAP");
            self.mappings.extend(twin.ok().flatten().map(|id| (vm, id.0)));
        }
    }

    /// Both VMMs show the same bytes at the same places, and were asked the same.
    pub fn compare_windows(&mut self) {
        for vm in 0..2 {
            let window = &self.windows[vm];
            let Some(vmm) = &self.guests[vm].vmm else { continue };
            let held = window.held.as_ref().map(|todo| match todo {
                Todo::Map { range, .. } | Todo::Barrier { range, .. } => (true, *range),
                Todo::Unmap { range, .. } => (false, *range),
            });
            let twin: Vec<(u64, u64)> =
                window.shown.iter().map(|(at, (len, ..))| (*at, *len)).collect();
            let real = || {
                let range = |start, len| WindowRange { start, len };
                let held = vmm.held().map(|asked| (asked.map, range(asked.at, asked.len)));
                (vmm.shown(), held)
            };
            wait_for(patience(), || real() == (twin.clone(), held));
            assert_eq!(real(), (twin, held), "window of VM {vm}");
            for (at, (len, ..)) in &window.shown {
                let real = vmm.read(*at, *len as usize).expect("shown");
                assert!(real == window.bytes(*at), "VM {vm}: other bytes at {at:#x} of the window");
            }
            assert_eq!(self.guests[vm].unclaimed(), 0, "an answer of VM {vm} that came too early");
        }
    }
}

impl Windowed {
    /// As the fake VMM does.
    fn answer(&mut self, todo: Todo<Shown<Rc<Memory>>>) -> Answer {
        match (todo, self.manner) {
            (Todo::Barrier { place, range }, _) if range.len != GRANULE => {
                Answer::Settled { place }
            }
            (_, Manner::Closes) => Answer::Broken,
            (Todo::Barrier { place, .. }, _) => Answer::Settled { place },
            (Todo::Map { place, .. }, Manner::Refuses) => Answer::Mapped { place, done: false },
            (Todo::Map { place, range, file_start, what, .. }, _) => {
                self.shown.insert(range.start, (range.len, what.memory, file_start));
                Answer::Mapped { place, done: true }
            }
            (Todo::Unmap { place, .. }, Manner::Keeps) => Answer::Unmapped { place, done: false },
            (Todo::Unmap { place, range }, _) => {
                self.shown.remove(&range.start);
                Answer::Unmapped { place, done: true }
            }
        }
    }
}
