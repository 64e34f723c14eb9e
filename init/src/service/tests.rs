//! Service files: what is read, and what the messages say.

use super::*;

fn parse(text: &str) -> ServiceFile {
    ServiceFile::parse("x.toml", text).unwrap()
}

fn message(text: &str) -> String {
    ServiceFile::parse("x.toml", text).unwrap_err().to_string()
}

#[test]
fn the_shortest_file_is_a_daemon_that_is_kept_up() {
    let service = parse("exec = '/sbin/syslogd -n'");
    assert_eq!(service.exec.as_slice(), ["/sbin/syslogd", "-n"]);
    assert_eq!(service.kind, Kind::Daemon);
    assert_eq!(service.restart_policy(), Restart::Always);
    assert_eq!(service.log, Log::File);
    assert_eq!(service.stop_signal.number(), 15);
    assert_eq!(service.dir, PathBuf::from("/"));
}

#[test]
fn every_key_is_read() {
    let service = parse(
        r#"
        exec = ["/usr/sbin/nginx", "-g", "daemon off;"]
        kind = "daemon"
        after = ["syslogd"]
        requires = ["network"]
        restart = "on-failure"
        restart_delay_ms = 500
        restart_delay_max_ms = 60000
        stable_ms = 1000
        user = "www-data"
        group = "33"
        env = { LANG = "C" }
        dir = "/var/www"
        limits = { nofile = 65536, core = "0:unlimited", nproc = "unlimited" }
        notify = true
        start_timeout_ms = 1
        log = "console"
        log_size_bytes = 4096
        console = "/dev/tty1"
        stop_signal = "SIGQUIT"
        stop_timeout_ms = 3000
        "#,
    );
    assert_eq!(service.exec.as_slice()[2], "daemon off;");
    assert_eq!(service.dependencies().collect::<Vec<_>>(), ["syslogd", "network"]);
    assert_eq!(service.restart_policy(), Restart::OnFailure);
    assert_eq!(service.limits[&Resource::Nofile].soft, Some(65536));
    assert_eq!(service.limits[&Resource::Core], Limit { soft: Some(0), hard: None });
    assert_eq!(service.stop_signal.number(), 3);
    assert!(service.notify);
}

#[test]
fn a_oneshot_runs_once() {
    assert_eq!(parse("exec = 'a'\nkind = 'oneshot'").restart_policy(), Restart::Never);
}

#[test]
fn messages_name_the_place_and_the_nearest_key() {
    let cases = [
        ("exec = 'a'\n  exce = 'b'", "x.toml:2:3: unknown key 'exce', did you mean 'exec'?"),
        ("exec = 'a'\nrestart_delay = 1", "restart_delay_ms"),
        ("exec = 'a'\ncolour = 1", "x.toml:2:1: unknown key 'colour'"),
        ("exec = 'a'\nkind = 'demon'", "x.toml:2:8: unknown variant `demon`"),
        ("exec = 1", "x.toml:1:8: expected a string or an array of strings"),
        ("exec = ''", "x.toml:1:8: the command is empty"),
        ("exec = \"'\"", "x.toml:1:8: a quote is not closed"),
        ("exec = 'a'\nstop_signal = 'SIGFOO'", "x.toml:2:15: unknown signal"),
        ("exec = 'a'\n[limits]\nnofle = 1", "x.toml:3:1: "),
        ("exec = 'a'\n[limits]\nnofile = '9:1'", "x.toml:3:10: the soft limit is above"),
        ("exec = 'a", "x.toml:1:"),
        ("kind = 'oneshot'", "missing field `exec`"),
        ("exec = 'a'\ndir = 'tmp'", "x.toml: dir is not an absolute path"),
        ("exec = 'a'\nkind = 'oneshot'\nnotify = true", "x.toml: a oneshot is up when"),
        ("exec = 'a'\nkind = 'oneshot'\nrestart = 'always'", "would never be up"),
        ("exec = 'a'\nrestart_delay_ms = 40000", "longer than"),
    ];
    for (text, expected) in cases {
        let message = message(text);
        assert!(message.contains(expected), "{text:?} gave: {message}");
    }
}

#[test]
fn names() {
    for good in ["syslogd", "getty@tty1", "a.b-c_d", "0"] {
        assert!(is_name(good), "{good}");
    }
    for bad in ["", ".", "..", "a/b", "-x", "a b", "é", "a\n", &"x".repeat(65)] {
        assert!(!is_name(bad), "{bad:?}");
    }
}

#[test]
fn the_manual_has_every_key() {
    let manual = include_str!("../../man/vsinit.8");
    let unknown = toml::from_str::<ServiceFile>("unknown-key = 1").unwrap_err();
    // serde's words: unknown field `X`, expected one of `A`, `B`, ...
    let keys: Vec<&str> = unknown.message().split('`').skip(3).step_by(2).collect();
    assert!(keys.len() > 15, "{keys:?}");
    for key in keys {
        assert!(manual.contains(&format!("Cm {key} No =")), "{key} is not in vsinit(8)");
    }
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in ".{0,200}") {
        let _ = ServiceFile::parse("x.toml", &text);
    }
}
