//! What a server's processes may not ask of the kernel, and why.

use std::fmt;

use super::Listener;
use super::assemble::{Verdict, assemble, dump};
use crate::error::During;
use crate::{Result, sys};

/// Which filter a server gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// Also refuse what a checkpoint could not save: nested namespaces other than mount and net, io_uring, BPF programs, MPTCP,
    /// pidfds.
    pub migratable: bool,
    /// Refuse only what changes the host as a whole, for servers that are trusted with it.
    pub privileged: bool,
    /// Leave `sysinfo` and `sched_getaffinity`, which tell of the whole host, to who holds the filter's listener.
    pub listened: bool,
}

/// A system call: its number for x86_64 (and x32), and for i386.
pub(super) type Numbers = (Option<u32>, Option<u32>);

const fn both(x86_64: u32, i386: u32) -> Numbers {
    (Some(x86_64), Some(i386))
}

/// In every profile: the host's kernel, memory, clock and files outside the server.
///
/// In a user namespace most of these fail anyway; refused here they are not even reached, and a privileged server
/// has no user namespace to rely on.
const HOST: &[(&str, Numbers)] = &[
    ("kexec_load", both(246, 283)),
    ("kexec_load (x32)", (Some(528), None)),
    ("kexec_file_load", (Some(320), None)),
    ("init_module", both(175, 128)),
    ("finit_module", both(313, 350)),
    ("delete_module", both(176, 129)),
    // Opens any file of a file system, also outside the server's root.
    ("open_by_handle_at", both(304, 342)),
    ("iopl", both(172, 110)),
    ("ioperm", both(173, 101)),
    ("swapon", both(167, 87)),
    ("swapoff", both(168, 115)),
    ("acct", both(163, 51)),
    // There is one clock, and it is the host's.
    ("settimeofday", both(164, 79)),
    ("stime", (None, Some(25))),
    ("clock_settime", both(227, 264)),
    ("clock_settime64", (None, Some(404))),
    ("adjtimex", both(159, 124)),
    ("clock_adjtime", both(305, 343)),
    ("clock_adjtime64", (None, Some(405))),
];

/// Not in privileged servers: interfaces that are wide, seldom needed, and often the way in of an exploit.
const WIDE: &[(&str, Numbers)] = &[
    ("lookup_dcookie", both(212, 253)),
    ("nfsservctl", both(180, 169)),
    ("quotactl", both(179, 131)),
    ("quotactl_fd", both(443, 443)),
    ("perf_event_open", both(298, 336)),
    ("bpf", both(321, 357)),
    // Without kernel.dmesg_restrict anybody may read the log, in which the host and all its servers are.
    ("syslog", both(103, 103)),
    ("userfaultfd", both(323, 374)),
];

/// Keys are not namespaced by user namespace alone, and count against quotas of the host. ENOSYS, not EPERM: programs then
/// take it for a kernel without keys, which they know (systemd and PAM go on without).
const KEYS: &[(&str, Numbers)] =
    &[("add_key", both(248, 286)), ("request_key", both(249, 287)), ("keyctl", both(250, 288))];

/// What the kernel would answer with figures of the host. A [`Listener`] hears these numbers again.
pub(super) const SYSINFO: Numbers = both(99, 116);
pub(super) const SCHED_GETAFFINITY: Numbers = both(204, 242);

const SOCKET: Numbers = both(41, 359);
const BPF: Numbers = both(321, 357);
const IO_URING_SETUP: Numbers = both(425, 425);
const CLONE: Numbers = both(56, 120);
const CLONE3: Numbers = both(435, 435);
const UNSHARE: Numbers = both(272, 310);
const PIDFD_OPEN: Numbers = both(434, 434);
const WAITID: Numbers = both(247, 284);
const GETSOCKOPT: Numbers = both(55, 365);
const SETSOCKOPT: Numbers = both(54, 366);
const IOCTL: Numbers = both(16, 54);
/// x32 has its own numbers for these.
const WAITID_X32: Numbers = (Some(529), None);
const SETSOCKOPT_X32: Numbers = (Some(541), None);
const GETSOCKOPT_X32: Numbers = (Some(542), None);
const IOCTL_X32: Numbers = (Some(514), None);

/// Puts a character into the input of a terminal: a way out over a terminal shared with the host.
const TIOCSTI: u32 = 0x5412;

/// Of linux/wait.h: wait for the process of a pidfd.
const P_PIDFD: u32 = 3;
/// Of asm-generic/socket.h: a pidfd with each message, and that of the peer.
const SO_PASSPIDFD: u32 = 76;
const SO_PEERPIDFD: u32 = 77;

/// Namespaces that cannot be restored when they are nested (mount and net can).
const NESTED: u32 =
    (libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID | libc::CLONE_NEWUSER | libc::CLONE_NEWCGROUP) as u32;

/// A compiled filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    program: Vec<sys::ClassicInstruction>,
    listened: bool,
}

impl Filter {
    /// Compiles the filter of a profile; pure.
    pub fn compile(profile: &Profile) -> Filter {
        let rules = rules(profile);
        let x86_64: Vec<_> = rules.iter().filter_map(|((number, _), verdict)| Some(((*number)?, *verdict))).collect();
        let i386: Vec<_> = rules.iter().filter_map(|((_, number), verdict)| Some(((*number)?, *verdict))).collect();
        Filter { program: assemble(&x86_64, &i386), listened: profile.listened }
    }

    /// Puts the filter on the calling thread and all it will make, for ever. EACCES: without `CAP_SYS_ADMIN` in the
    /// user namespace, `process::no_new_privileges` comes first.
    ///
    /// A filter that asks gives its listener, close-on-exec. Who is asked waits until somebody answers, or the last copy
    /// of the listener is closed: then the call does not exist (ENOSYS). EBUSY: a filter around this one has a listener
    /// already, and there can be only one.
    ///
    /// Join a new session keyring before: after it keyctl(2) does not exist.
    pub fn install(&self) -> Result<Option<Listener>> {
        let operation = format!("seccomp filter of {} instructions", self.program.len());
        if !self.listened {
            return sys::seccomp_set_filter(&self.program).map(|()| None).during("install", operation);
        }
        let listener = match sys::seccomp_set_listened_filter(&self.program, true) {
            // Linux before 5.19: there a signal may interrupt a caller that has been heard; it asks again.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                sys::seccomp_set_listened_filter(&self.program, false)
            }
            other => other,
        };
        let operation = match &listener {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                format!("{operation}: somebody answers calls of this process already, and sysinfo = \"own\" needs to")
            }
            _ => operation,
        };
        listener.map(|fd| Some(Listener::from(fd))).during("install", operation)
    }
}

/// The program as text, one instruction a line.
impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&dump(&self.program))
    }
}

fn rules(profile: &Profile) -> Vec<(Numbers, Verdict)> {
    let mut rules: Vec<(Numbers, Verdict)> = Vec::with_capacity(48);
    let refuse = |list: &[(&str, Numbers)], errno: i32| -> Vec<(Numbers, Verdict)> {
        list.iter().map(|(_, numbers)| (*numbers, Verdict::Fail(errno))).collect()
    };
    rules.extend(refuse(HOST, libc::EPERM));
    let inject = Verdict::FailOnValues { arguments: &[(1, TIOCSTI)], errno: libc::EPERM };
    rules.extend([(IOCTL, inject), (IOCTL_X32, inject)]);
    if !profile.privileged {
        rules.extend(refuse(WIDE, libc::EPERM));
        rules.extend(refuse(KEYS, libc::ENOSYS));
    }
    if profile.migratable {
        rules.extend(migratable_rules());
        rules.extend(without_pidfds());
    }
    if profile.listened {
        rules.extend([SYSINFO, SCHED_GETAFFINITY].map(|numbers| (numbers, Verdict::Ask)));
    }
    rules
}

/// What CRIU cannot save; systemd and its services go on without all of it.
fn migratable_rules() -> [(Numbers, Verdict); 6] {
    let nested = |bits| Verdict::FailOnBits { argument: 0, bits, errno: libc::EPERM };
    [
        // The bit of CLONE_NEWTIME lies in clone's exit signal, so only unshare(2) can ask for a time namespace.
        (CLONE, nested(NESTED)),
        (UNSHARE, nested(NESTED | libc::CLONE_NEWTIME as u32)),
        // Its flags are behind a pointer, which a filter cannot follow; libc then takes clone.
        (CLONE3, Verdict::Fail(libc::ENOSYS)),
        (IO_URING_SETUP, Verdict::Fail(libc::ENOSYS)),
        (BPF, Verdict::Fail(libc::EPERM)),
        // As a kernel without it says: programs then take TCP. Those in Go, from 1.24 on, ask for this whenever they listen. What 32-bit
        // programs ask for by socketcall(2) is behind a pointer.
        (SOCKET, Verdict::FailOnValues { arguments: &[(2, libc::IPPROTO_MPTCP as u32)], errno: libc::EPROTONOSUPPORT }),
    ]
}

/// As a kernel without pidfds says, each in its own way (clone3(2) is refused anyway).
///
/// CRIU gives a pidfd back, but not its inode's number, by which Linux from 6.9 on tells one process from another: there is
/// no way to ask for one. systemd, from 257 on, keeps these numbers, and after a resume took no notice of what its services
/// told it: three minutes later its watchdog killed them. Without pidfds it goes by pids, which come back as they were.
fn without_pidfds() -> [(Numbers, Verdict); 8] {
    const SOCKET_LEVEL: (u32, u32) = (1, libc::SOL_SOCKET as u32);
    let wait = Verdict::FailOnValues { arguments: &[(0, P_PIDFD)], errno: libc::EINVAL };
    let pass = Verdict::FailOnValues { arguments: &[SOCKET_LEVEL, (2, SO_PASSPIDFD)], errno: libc::ENOPROTOOPT };
    let peer = Verdict::FailOnValues { arguments: &[SOCKET_LEVEL, (2, SO_PEERPIDFD)], errno: libc::ENOPROTOOPT };
    [
        (PIDFD_OPEN, Verdict::Fail(libc::ENOSYS)),
        (CLONE, Verdict::FailOnBits { argument: 0, bits: libc::CLONE_PIDFD as u32, errno: libc::EINVAL }),
        (WAITID, wait),
        (WAITID_X32, wait),
        (SETSOCKOPT, pass),
        (SETSOCKOPT_X32, pass),
        (GETSOCKOPT, peer),
        (GETSOCKOPT_X32, peer),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::assemble::{ALLOW, ASK, ERRNO, I386, X32_BIT, X86_64};
    use crate::seccomp::interpret::{Call, run};

    const PLAIN: Profile = Profile { migratable: false, privileged: false, listened: false };
    const MIGRATABLE: Profile = Profile { migratable: true, ..PLAIN };
    const PRIVILEGED: Profile = Profile { privileged: true, ..PLAIN };
    const LISTENED: Profile = Profile { listened: true, ..PLAIN };
    const ALL: [Profile; 6] = [
        PLAIN,
        MIGRATABLE,
        PRIVILEGED,
        Profile { migratable: true, ..PRIVILEGED },
        LISTENED,
        Profile { listened: true, ..PRIVILEGED },
    ];

    /// `allow` or the errno, and the number of steps.
    fn ask(profile: Profile, architecture: u32, number: u32, arguments: [u64; 2]) -> (Option<i32>, usize) {
        ask_with(profile, architecture, number, [arguments[0], arguments[1], 0, 0, 0, 0])
    }

    fn ask_with(profile: Profile, architecture: u32, number: u32, arguments: [u64; 6]) -> (Option<i32>, usize) {
        let (answer, steps) = run(&Filter::compile(&profile).program, &Call { architecture, number, arguments });
        let errno = match answer {
            ALLOW => None,
            other => {
                assert_eq!(other & 0xffff_0000, ERRNO, "nothing is killed");
                Some((other & 0xffff) as i32)
            }
        };
        (errno, steps)
    }

    fn answer(profile: Profile, architecture: u32, number: u32) -> Option<i32> {
        ask(profile, architecture, number, [0, 0]).0
    }

    #[test]
    fn what_harms_the_host_is_refused_on_every_abi_in_every_profile() {
        for profile in ALL {
            for (name, (native, foreign)) in HOST {
                for (architecture, number) in
                    [(X86_64, *native), (X86_64, native.map(|number| number | X32_BIT)), (I386, *foreign)]
                {
                    let Some(number) = number else { continue };
                    assert_eq!(answer(profile, architecture, number), Some(libc::EPERM), "{name} {profile:?}");
                }
            }
        }
    }

    #[test]
    fn every_other_call_is_allowed() {
        let rules = rules(&PLAIN);
        for number in 0..600 {
            let native_known = rules.iter().any(|((native, _), _)| *native == Some(number));
            let foreign_known = rules.iter().any(|((_, foreign), _)| *foreign == Some(number));
            assert_eq!(
                answer(PLAIN, X86_64, number).is_none(),
                !native_known || number == 16 || number == 514,
                "{number}"
            );
            assert_eq!(answer(PLAIN, I386, number).is_none(), !foreign_known || number == 54, "{number}");
        }
        // What a tracer writes to skip a call.
        assert_eq!(answer(PLAIN, X86_64, u32::MAX), None);
    }

    #[test]
    fn only_a_listened_filter_asks_and_only_for_two_calls() {
        let asks = |profile: Profile, architecture, number| {
            let call = Call { architecture, number, arguments: [0; 6] };
            run(&Filter::compile(&profile).program, &call).0 == ASK
        };
        for number in 0..600 {
            let native = number == 99 || number == 204;
            assert_eq!(asks(LISTENED, X86_64, number), native, "{number}");
            assert_eq!(asks(LISTENED, X86_64, number | X32_BIT), native, "{number}");
            assert_eq!(asks(LISTENED, I386, number), number == 116 || number == 242, "{number}");
            for architecture in [X86_64, I386] {
                assert!(!asks(PLAIN, architecture, number) && !asks(MIGRATABLE, architecture, number));
            }
        }
    }

    #[test]
    fn an_unknown_architecture_has_no_system_calls() {
        let aarch64 = 0xc000_00b7;
        assert_eq!(answer(PLAIN, aarch64, 0), Some(libc::ENOSYS));
    }

    #[test]
    fn keys_do_not_exist_unless_privileged() {
        for (architecture, number) in [(X86_64, 250), (I386, 288), (X86_64, 250 | X32_BIT)] {
            assert_eq!(answer(PLAIN, architecture, number), Some(libc::ENOSYS));
            assert_eq!(answer(PRIVILEGED, architecture, number), None);
        }
    }

    #[test]
    fn reboot_mount_and_the_new_mount_api_are_allowed() {
        for number in [169, 165, 166, 155, 428, 429, 430, 442] {
            assert_eq!(answer(MIGRATABLE, X86_64, number), None, "{number}");
        }
    }

    #[test]
    fn terminals_take_no_injected_input() {
        for (architecture, number) in [(X86_64, 16), (X86_64, 514 | X32_BIT), (I386, 54)] {
            let ioctl = |request| ask(PRIVILEGED, architecture, number, [0, request]).0;
            assert_eq!(ioctl(u64::from(TIOCSTI)), Some(libc::EPERM));
            // The kernel looks at 32 bits; a filter must not look at more.
            assert_eq!(ioctl(0xdead_0000_0000 | u64::from(TIOCSTI)), Some(libc::EPERM));
            assert_eq!(ioctl(0x5413), None);
        }
    }

    #[test]
    fn migratable_servers_nest_mount_and_net_namespaces_only() {
        let refused =
            [libc::CLONE_NEWUTS, libc::CLONE_NEWIPC, libc::CLONE_NEWPID, libc::CLONE_NEWUSER, libc::CLONE_NEWCGROUP];
        for (architecture, clone, unshare, clone3) in [(X86_64, 56, 272, 435), (I386, 120, 310, 435)] {
            for flag in refused {
                let flags = [flag as u64 | libc::SIGCHLD as u64, 0];
                assert_eq!(ask(MIGRATABLE, architecture, clone, flags).0, Some(libc::EPERM));
                assert_eq!(ask(MIGRATABLE, architecture, unshare, [flag as u64, 0]).0, Some(libc::EPERM));
                assert_eq!(ask(PLAIN, architecture, unshare, [flag as u64, 0]).0, None);
            }
            let allowed = (libc::CLONE_NEWNS | libc::CLONE_NEWNET) as u64;
            assert_eq!(ask(MIGRATABLE, architecture, clone, [allowed | libc::SIGCHLD as u64, 0]).0, None);
            assert_eq!(ask(MIGRATABLE, architecture, unshare, [allowed, 0]).0, None);
            assert_eq!(ask(MIGRATABLE, architecture, unshare, [libc::CLONE_NEWTIME as u64, 0]).0, Some(libc::EPERM));
            assert_eq!(answer(MIGRATABLE, architecture, clone3), Some(libc::ENOSYS));
            assert_eq!(answer(PLAIN, architecture, clone3), None);
        }
    }

    #[test]
    fn migratable_servers_take_tcp_for_mptcp() {
        for (architecture, number) in [(X86_64, 41), (X86_64, 41 | X32_BIT), (I386, 359)] {
            let socket = |profile, protocol: i32| {
                let arguments = [libc::AF_INET as u64, libc::SOCK_STREAM as u64, protocol as u64, 0, 0, 0];
                ask_with(profile, architecture, number, arguments).0
            };
            assert_eq!(socket(MIGRATABLE, libc::IPPROTO_MPTCP), Some(libc::EPROTONOSUPPORT));
            assert_eq!(socket(PLAIN, libc::IPPROTO_MPTCP), None);
            for protocol in [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::NETLINK_ROUTE] {
                assert_eq!(socket(MIGRATABLE, protocol), None);
            }
        }
    }

    #[test]
    fn migratable_servers_have_no_pidfds() {
        let socket = libc::SOL_SOCKET as u64;
        let cases = [
            // (x86_64, x32, i386), arguments, what it says, arguments with which it is allowed
            ([247, 529, 284], [3, 9, 0], libc::EINVAL, [1, 3, 3]),
            ([54, 541, 366], [9, socket, 76], libc::ENOPROTOOPT, [9, socket, 77]),
            // IPV6_RECVFRAGSIZE has the number of SO_PEERPIDFD.
            ([55, 542, 365], [9, socket, 77], libc::ENOPROTOOPT, [9, libc::IPPROTO_IPV6 as u64, 77]),
            ([56, 56, 120], [0x1000 | libc::SIGCHLD as u64, 0, 0], libc::EINVAL, [libc::SIGCHLD as u64, 0, 0]),
        ];
        for (numbers, refused, errno, allowed) in cases {
            for (architecture, number) in [(X86_64, numbers[0]), (X86_64, numbers[1] | X32_BIT), (I386, numbers[2])] {
                let answer = |profile, [one, two, three]: [u64; 3]| {
                    ask_with(profile, architecture, number, [one, two, three, 0, 0, 0]).0
                };
                assert_eq!(answer(MIGRATABLE, refused), Some(errno), "{number}");
                assert_eq!(answer(MIGRATABLE, allowed), None, "{number}");
                assert_eq!(answer(PLAIN, refused), None, "{number}");
            }
        }
        for (architecture, number) in [(X86_64, 434), (X86_64, 434 | X32_BIT), (I386, 434)] {
            assert_eq!(answer(MIGRATABLE, architecture, number), Some(libc::ENOSYS));
            assert_eq!(answer(PLAIN, architecture, number), None);
        }
    }

    #[test]
    fn a_thread_is_not_a_namespace() {
        let thread = (libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SETTLS
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_CLEARTID) as u64;
        assert_eq!(ask(MIGRATABLE, X86_64, 56, [thread, 0]).0, None);
    }

    #[test]
    fn the_common_path_is_short() {
        for profile in ALL {
            let filter = Filter::compile(&profile);
            assert!(filter.program.len() < 320, "{} instructions", filter.program.len());
            // read, write, close, mmap, futex, epoll_wait, openat, statx
            for number in [0, 1, 3, 9, 202, 232, 257, 332] {
                let (errno, steps) = ask(profile, X86_64, number, [0, 0]);
                assert_eq!(errno, None);
                assert!(steps <= 14, "{number}: {steps} steps");
            }
        }
    }
}
