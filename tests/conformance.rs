//! One test for each device-normative label of `spec/virtio-bufshare.md`.
mod common;
use common::*;

#[test]
fn connects() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    guest.export_pages(4);
}
