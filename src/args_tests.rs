//! The words of the command line.

use super::*;

fn settings(args: &[&str]) -> Result<Settings, Error> {
    Args::parse_from(std::iter::once("test").chain(args.iter().copied())).settings()
}

fn complaint(args: &[&str]) -> String {
    settings(args).unwrap_err().to_string()
}

#[test]
fn vms_are_numbered_in_their_order_and_rules_name_them() {
    let found = settings(&[
        "--vm",
        "name=app,socket=/a",
        "--vm",
        "name=ui,fd=7,unsealed-ram,max-exports=3,max-bytes=4096,on-stop=revoke",
        "--allow",
        "app:ui",
        "--allow",
        "*:host:ro",
    ])
    .unwrap();
    assert_eq!(found.vms[0].socket, Socket::Path("/a".into()));
    let ui = &found.vms[1];
    assert_eq!(
        (ui.socket.clone(), ui.unsealed_ram, ui.revoke_on_stop),
        (Socket::Fd(7), true, true)
    );
    assert_eq!((ui.quota.max_exports, ui.quota.max_total_size), (3, 4096));
    let app_to_ui = Rule { from: Side::One(PeerId(2)), to: Side::One(PeerId(3)), read_only: false };
    let all_to_host = Rule { from: Side::Any, to: Side::One(PeerId::HOST), read_only: true };
    assert_eq!(found.rules, [app_to_ui, all_to_host]);
}

#[test]
fn errors_name_the_word_and_the_remedy() {
    let one = ["--vm", "name=a,socket=/a"];
    let with = |more: &[&'static str]| complaint(&[&one, more].concat());
    assert!(complaint(&[]).contains("--vm name=NAME,socket=PATH"));
    assert!(with(&["--vm", "name=a,socket=/b"]).contains("two VMs are called \"a\""));
    assert!(with(&["--vm", "name=b,socket=/a"]).contains("two VMs have the socket"));
    assert!(with(&["--vm", "socket=/b"]).contains("it needs name=NAME"));
    assert!(with(&["--vm", "name=b"]).contains("it needs socket=PATH or fd=N"));
    assert!(with(&["--vm", "name=b,socket=/b,color=red"]).contains("\"color=red\" is unknown"));
    assert!(with(&["--vm", "name=host,socket=/b"]).contains("not \"host\""));
    assert!(with(&["--vm", "name=b,socket=/b,max-exports=-1"]).contains("max-exports"));
    assert!(with(&["--allow", "a:c"]).contains("no VM is called \"c\""));
    assert!(with(&["--allow", "a"]).contains("FROM:TO"));
    assert!(with(&["--allow", "a:host:rw"]).contains("FROM:TO:ro"));
    assert!(with(&["--udmabuf", "maybe"]).contains("auto, off"));
    assert!(with(&["--config", "/nonexistent.toml"]).contains("/nonexistent.toml"));
}

#[test]
fn a_file_says_the_same_as_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    let text = "allow = [\"a:host:ro\"]\nhost-socket = \"/h\"\nudmabuf = \"off\"\nsandbox = false\n\
                [[vm]]\nname = \"a\"\nsocket = \"/a\"\nmax-exports = 9\nunsealed-ram = true\n";
    std::fs::write(&path, text).unwrap();
    let found = settings(&["--config", path.to_str().unwrap()]).unwrap();
    let words = settings(&[
        "--vm",
        "name=a,socket=/a,max-exports=9,unsealed-ram",
        "--allow",
        "a:host:ro",
        "--udmabuf",
        "off",
        "--host-socket",
        "/h",
        "--sandbox",
        "off",
    ])
    .unwrap();
    assert_eq!((found.vms, found.rules), (words.vms, words.rules));
    assert_eq!((found.sandbox, words.sandbox), (false, false));
    assert_eq!((found.host_socket, found.udmabuf), (words.host_socket, words.udmabuf));
    std::fs::write(&path, "vms = 1\n").unwrap();
    assert!(settings(&["--config", path.to_str().unwrap()]).is_err());
}

#[test]
fn a_window_is_a_power_of_two_or_none() {
    let with = |size: &'static str| settings(&["--vm", "name=a,socket=/a", "--window-size", size]);
    assert_eq!(settings(&["--vm", "name=a,socket=/a"]).unwrap().window_size, DEFAULT_WINDOW);
    for (text, size) in [("0", 0), ("4096", GRANULE), ("1099511627776", MAX_WINDOW)] {
        assert_eq!(with(text).unwrap().window_size, size);
    }
    for text in ["1", "2048", "12288", "2199023255552"] {
        assert!(with(text).unwrap_err().to_string().contains("power of two"), "{text}");
    }
}
