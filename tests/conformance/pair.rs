//! Two VMs on one daemon, one of which exports what the other attaches.

use super::*;

/// "a" may share with "b", and "c" with nobody.
pub struct Pair {
    pub daemon: Daemon,
    pub a: Guest,
    pub b: Guest,
}

/// An attachment that is mapped to pages of "b".
#[derive(Debug, Clone, Copy)]
pub struct View {
    pub handle: u64,
    pub mapping: u64,
    pub addr: u64,
}

pub fn pair() -> Pair {
    pair_with(&[])
}

/// As [`pair`], with further arguments.
pub fn pair_with(args: &[&str]) -> Pair {
    let args = ["--allow", "a:b"].iter().chain(args).map(|arg| (*arg).to_owned()).collect();
    let vms = ["name=a", "name=b", "name=c"].map(String::from).to_vec();
    let daemon = Launch { vms, args, ..Default::default() }.start();
    let [a, b] = ["a", "b"].map(|name| quiet().connect(&daemon, name));
    Pair { daemon, a, b }
}

/// A guest that does not want to hear of peers.
pub fn quiet() -> Setup {
    Setup { decline: 1 << feature::PEERS, ..Default::default() }
}

impl Pair {
    /// Exports fresh pages of "a".
    pub fn exported(&mut self, pages: u64) -> Buffer {
        let (export, addr) = self.a.export_pages(pages);
        buffer(&export, addr, pages)
    }

    /// Exports fresh pages of "a" and grants them to "b".
    pub fn granted(&mut self, pages: u64) -> Buffer {
        let buffer = self.exported(pages);
        self.grant(&buffer, READ_WRITE);
        buffer
    }

    #[track_caller]
    pub fn grant(&mut self, buffer: &Buffer, access: u32) {
        let peer_id = self.b.config.peer_id.get();
        let grant = Grant { handle: buffer.handle, peer_id, access, ..Default::default() };
        self.a.grant(grant).expect("GRANT");
    }

    /// Withdraws the grant of "b", and what it attached.
    #[track_caller]
    pub fn revoke(&mut self, buffer: &Buffer) {
        let (peer_id, flags) = (self.b.config.peer_id.get(), flag::GRANT_FORCE);
        let grant = Grant { flags, handle: buffer.handle, peer_id, access: 0, lifetime_ms: 0 };
        self.a.grant(grant).expect("GRANT");
    }

    #[track_caller]
    pub fn attach(&mut self, buffer: &Buffer) -> u64 {
        let request = Attach { uuid: buffer.uuid, ..Default::default() };
        self.b.attach(request).expect("ATTACH").0.handle.get()
    }

    /// "b" attaches the whole buffer and maps it to fresh pages.
    #[track_caller]
    pub fn view(&mut self, buffer: &Buffer) -> View {
        let handle = self.attach(buffer);
        let addr = self.b.pages(buffer.size / PAGE);
        let segments = vec![(addr, buffer.size)];
        let mapping = self.b.map(&Map { handle, segments, ..Default::default() }).expect("MAP");
        View { handle, mapping, addr }
    }
}

/// The buffer by the handle of an attachment.
pub fn held(view: &View, buffer: &Buffer) -> Buffer {
    Buffer { handle: view.handle, ..*buffer }
}
