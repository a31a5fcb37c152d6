//! Decisions about rights as lines for the operator: `key=value`, in a fixed order.
//!
//! It knows their text, not where they are written or how often.

use crate::ids::{Access, PeerId};
use crate::registry::Audit;

/// The line of a decision, and whose log it burdens. `name` tells the operator's names of VMs.
pub fn line<'a>(audit: Audit, name: impl Fn(PeerId) -> &'a str) -> (PeerId, String) {
    let name = |peer: PeerId| match peer {
        PeerId::HOST => "host",
        PeerId::ANY => "*",
        _ => name(peer),
    };
    let rights = |access: Access| match (access.read, access.write) {
        (true, true) => "read,write",
        (true, false) => "read",
        (false, true) => "write",
        (false, false) => "none",
    };
    match audit {
        Audit::Granted { exporter, to, uuid, access } => {
            let (from, to, access) = (name(exporter), name(to), rights(access));
            (exporter, format!("event=grant from={from} to={to} buffer={uuid} access={access}"))
        }
        Audit::Attached { importer, exporter, uuid, access } => {
            let (from, to, access) = (name(exporter), name(importer), rights(access));
            (importer, format!("event=attach from={from} to={to} buffer={uuid} access={access}"))
        }
        Audit::Denied { importer, uuid, status } => {
            let (to, status) = (name(importer), status.name());
            (importer, format!("event=denied to={to} buffer={uuid} status={status}"))
        }
        Audit::Revoked { importer, exporter, uuid } => {
            let (from, to) = (name(exporter), name(importer));
            (exporter, format!("event=revoke from={from} to={to} buffer={uuid}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Status;
    use uuid::Uuid;

    #[test]
    fn a_line_says_who_what_and_how() {
        let (exporter, importer, uuid) = (PeerId(2), PeerId(3), Uuid::nil());
        let name = |peer: PeerId| if peer == exporter { "app" } else { "ui" };
        let (access, status) = (Access::READ, Status::NoEnt);
        let text = |audit| line(audit, name);
        let granted = |to| Audit::Granted { exporter, to, uuid, access };
        assert_eq!(
            text(granted(PeerId::ANY)),
            (exporter, format!("event=grant from=app to=* buffer={uuid} access=read"))
        );
        assert!(text(granted(PeerId::HOST)).1.contains("to=host"));
        assert_eq!(
            text(Audit::Denied { importer, uuid, status }),
            (importer, format!("event=denied to=ui buffer={uuid} status=NOENT"))
        );
        let attached = Audit::Attached { importer, exporter, uuid, access: Access::ALL };
        assert!(text(attached).1.ends_with(
            "from=app to=ui buffer=00000000-0000-0000-0000-000000000000 access=read,write"
        ));
        assert_eq!(text(Audit::Revoked { importer, exporter, uuid }).0, exporter);
    }
}
