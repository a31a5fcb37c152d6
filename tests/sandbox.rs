//! The daemon gives up what it does not need, and serves all the same.

mod common;

use common::*;

fn status(daemon: &Daemon, field: &str) -> String {
    let path = format!("/proc/{}/status", daemon.pid());
    let text = std::fs::read_to_string(path).expect("status of the daemon");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    line.trim_start_matches(':').trim().to_owned()
}

#[test]
fn the_sandbox_is_on_and_guests_are_served() {
    let daemon = Daemon::start(&["a"]);
    let mut guest = Guest::connect(&daemon, "a");
    guest.export_pages(2);
    assert_eq!(status(&daemon, "Seccomp"), "2");
    assert_eq!(status(&daemon, "NoNewPrivs"), "1");
}

#[test]
fn the_operator_can_switch_it_off() {
    let args = vec!["--sandbox".into(), "off".into()];
    let daemon = Launch { args, ..Default::default() }.start();
    Guest::connect(&daemon, "a").export_pages(1);
    assert_eq!(status(&daemon, "Seccomp"), "0");
}
