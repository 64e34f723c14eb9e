//! The control socket of a supervising vsinit: requests, replies, and the client's side.
//!
//! One request per connection, on a stream socket with mode 0600: the client writes one TOML
//! document and closes its sending side; the server writes one TOML document and closes. Whoever
//! may open the socket is root of the server or of the host, so no credentials are looked at.

use std::io::{self, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Where a supervising vsinit listens, as a guest path.
pub const SOCKET: &str = "/run/vsinit/control";

/// A longer request is refused.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// A client gives up on a longer reply; the server cuts logs well below it.
const MAX_REPLY_BYTES: usize = 1024 * 1024;

/// How long a client waits for the reply unless it says otherwise. Stopping a service may take as long as
/// the longest `stop_timeout_ms`, and the reply comes when it is down.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(600);

/// How long [`consoles`] takes at most: nothing has to be waited for to hand them out.
pub const CONSOLES_TIMEOUT: Duration = Duration::from_secs(5);

/// 255 ttys at most, a console and a notify socket; the kernel passes 253 at a time.
const MAX_DESCRIPTORS: usize = 253;

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// All services and their states.
    List,
    /// Start a service and what it requires; answered when it is up, done or failed.
    Start {
        /// The service's name: its file's name without `.toml`.
        name: String,
    },
    /// Stop a service and what requires it; answered when it is down.
    Stop {
        /// The service's name.
        name: String,
    },
    /// Stop a service alone, then start it; answered when it is up, done or failed.
    Restart {
        /// The service's name.
        name: String,
    },
    /// The last lines of a service's log file.
    Log {
        /// The service's name.
        name: String,
        /// How many lines at most.
        lines: u32,
    },
    /// Stop everything, then power off.
    Poweroff,
    /// Stop everything, then reboot.
    Reboot,
    /// Stop everything, then halt.
    Halt,
    /// The masters of the console and the ttys, and the notify socket; see [`consoles`].
    Consoles,
}

/// What vsinit answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// Done, or begun in the case of a shutdown.
    Done,
    /// The answer to [`Request::List`].
    Services {
        /// By name.
        #[serde(default)]
        services: Vec<Service>,
    },
    /// The answer to [`Request::Log`].
    Log {
        /// Without a line end at the end.
        text: String,
    },
    /// The answer to [`Request::Consoles`]: this many descriptors came with the reply.
    Consoles {
        /// Console, tty1 … ttyN, then the notify socket.
        count: u32,
    },
    /// It was not done.
    Failed {
        /// One sentence for the user.
        message: String,
    },
}

/// One line of [`Reply::Services`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its file's name without `.toml`.
    pub name: String,
    /// Such as `running`, `stopped`, `failed`: the words of vsinit(8).
    pub state: String,
    /// The main process, as the guest numbers it.
    pub pid: Option<i32>,
    /// Seconds in this state.
    pub since_s: u64,
    /// How often it was started again without being asked.
    pub restarts: u32,
    /// How the last process ended, such as `exit 1` or `signal 9`; or why it was not started.
    pub last: Option<String>,
}

/// Why a request got no reply.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No vsinit listens there.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("cannot {operation}")]
    Talk {
        /// What was being done.
        operation: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The reply is not a reply.
    #[error("the reply of vsinit is not valid")]
    Parse(#[source] toml::de::Error),
    /// The request cannot be written as TOML.
    #[error("the request cannot be written as TOML")]
    Write(#[source] toml::ser::Error),
    /// Another reply than the request asks for, or the words of [`Reply::Failed`].
    #[error("vsinit answered: {0}")]
    Answer(String),
}

/// Asks the vsinit that listens at `path` and waits for its reply.
///
/// From outside, a guest path must not be followed blindly: see [`call_descriptor`].
pub fn call(path: &Path, request: &Request) -> Result<Reply, Error> {
    Ok(exchange(path, request, REPLY_TIMEOUT, 0)?.0)
}

/// Asks the vsinit behind an `O_PATH` descriptor of its socket.
///
/// For the host: `/proc/PID/root/run/vsinit/control` would follow the guest's symbolic links to
/// wherever they point on the host. Resolve below the guest's root first (`openat2` with
/// `RESOLVE_IN_ROOT`, and `O_PATH`), then call this.
pub fn call_descriptor(socket: BorrowedFd, request: &Request) -> Result<Reply, Error> {
    call_within(socket, request, REPLY_TIMEOUT)
}

/// [`call_descriptor`] with another end to the patience: a guest's vsinit is the guest's, and may never
/// answer, or a byte now and then. `timeout` is for all of the conversation.
pub fn call_within(socket: BorrowedFd, request: &Request, timeout: Duration) -> Result<Reply, Error> {
    Ok(exchange(&descriptor_path(socket), request, timeout, 0)?.0)
}

/// Fetches the console's master, those of tty1 … ttyN and the notify socket, in this order.
pub fn consoles(socket: BorrowedFd) -> Result<Vec<OwnedFd>, Error> {
    match exchange(&descriptor_path(socket), &Request::Consoles, CONSOLES_TIMEOUT, MAX_DESCRIPTORS)? {
        (Reply::Consoles { count }, descriptors) if descriptors.len() == count as usize => Ok(descriptors),
        (Reply::Failed { message }, _) => Err(Error::Answer(message)),
        (reply, descriptors) => Err(Error::Answer(format!("{reply:?} with {} descriptors", descriptors.len()))),
    }
}

fn descriptor_path(socket: BorrowedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

/// The whole conversation: request, end of sending, reply, end. At most `most_descriptors` are taken.
fn exchange(
    path: &Path,
    request: &Request,
    timeout: Duration,
    most_descriptors: usize,
) -> Result<(Reply, Vec<OwnedFd>), Error> {
    let talk = |operation| move |source| Error::Talk { operation, source };
    let text = toml::to_string(request).map_err(Error::Write)?;
    let end = Instant::now() + timeout;
    let mut stream = connect(path, end)?;
    stream.set_write_timeout(Some(left(end).map_err(talk("send the request"))?)).map_err(talk("set a time-out"))?;
    stream.write_all(text.as_bytes()).map_err(talk("send the request"))?;
    stream.shutdown(Shutdown::Write).map_err(talk("end the request"))?;
    let (reply, descriptors) = receive(&stream, end, most_descriptors).map_err(talk("receive the reply"))?;
    let reply = String::from_utf8_lossy(&reply);
    Ok((toml::from_str(&reply).map_err(Error::Parse)?, descriptors))
}

/// A listener that accepts nothing lets others wait as soon as its queue is full: until `end`.
fn connect(path: &Path, end: Instant) -> Result<UnixStream, Error> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let connected = || -> io::Result<UnixStream> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Of sending: connect(2) goes by it (socket(7)).
        set_socket_timeout(&socket, Timeout::Send, Some(left(end)?))?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    };
    connected().map_err(|source| Error::Connect { path: path.into(), source })
}

/// What is left until `end`; an error when it has come.
fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// The reply to its end, with the descriptors that travel on its first byte. A peer that says a byte now and then does not
/// make it later.
fn receive(mut stream: &UnixStream, end: Instant, most_descriptors: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut piece = [0; 4096];
    stream.set_read_timeout(Some(left(end)?))?;
    let (length, descriptors) = receive_first(stream, &mut piece, most_descriptors)?;
    let mut reply = piece[..length].to_vec();
    let mut length = length;
    while length > 0 {
        stream.set_read_timeout(Some(left(end)?))?;
        length = stream.read(&mut piece)?;
        reply.extend_from_slice(&piece[..length]);
        if reply.len() > MAX_REPLY_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
        }
    }
    Ok((reply, descriptors))
}

/// The first piece of the reply and what came with it. Without room for descriptors none becomes ours: only closing one
/// of a guest's can take for ever.
fn receive_first(stream: &UnixStream, piece: &mut [u8], most: usize) -> io::Result<(usize, Vec<OwnedFd>)> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let size = if most == 0 { 0 } else { rustix::cmsg_space!(ScmRights(most)) };
    let mut space = vec![std::mem::MaybeUninit::uninit(); size];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(stream.as_fd(), &mut [IoSliceMut::new(piece)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn requests_and_replies_survive_the_round_trip() {
        let name = "syslogd".to_string();
        let requests = [
            Request::List,
            Request::Start { name: name.clone() },
            Request::Log { name: name.clone(), lines: 20 },
            Request::Consoles,
        ];
        for request in requests {
            let text = toml::to_string(&request).unwrap();
            assert_eq!(toml::from_str::<Request>(&text).unwrap(), request, "{text}");
        }
        let service = Service { name, state: "running".into(), pid: Some(7), since_s: 3, restarts: 0, last: None };
        let replies = [
            Reply::Done,
            Reply::Services { services: vec![] },
            Reply::Services { services: vec![service.clone(), service] },
            Reply::Log { text: "a\nb\u{1b}[0m".into() },
            Reply::Failed { message: "no service 'x'".into() },
        ];
        for reply in replies {
            let text = toml::to_string(&reply).unwrap();
            assert_eq!(toml::from_str::<Reply>(&text).unwrap(), reply, "{text}");
        }
    }

    #[test]
    fn a_request_is_readable_text() {
        let request = Request::Stop { name: "crond".into() };
        assert_eq!(toml::to_string(&request).unwrap(), "request = \"stop\"\nname = \"crond\"\n");
    }

    /// Has a peer that does `answer`, and asks it with some patience.
    fn ask(answer: impl FnOnce(UnixListener) + Send + 'static) -> Result<Reply, Error> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = std::thread::spawn(move || answer(listener));
        let reply = exchange(&path, &Request::List, Duration::from_millis(300), 0);
        peer.join().unwrap();
        Ok(reply?.0)
    }

    fn is_late(reply: Result<Reply, Error>) -> bool {
        let late = |source: io::Error| matches!(source.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock);
        match reply {
            Err(Error::Connect { source, .. } | Error::Talk { source, .. }) => late(source),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_peer_that_dribbles_is_late() {
        // Each piece comes in time, and in the end it is an answer: after three seconds.
        let reply = ask(|listener| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut text = vec![b'#'; 60];
            text.extend_from_slice(b"\nreply = \"done\"\n");
            for byte in text {
                std::thread::sleep(Duration::from_millis(50));
                if stream.write_all(&[byte]).is_err() {
                    return;
                }
            }
        });
        assert!(is_late(reply));
    }

    #[test]
    fn a_peer_that_never_answers_is_late() {
        assert!(is_late(ask(|listener| {
            let (mut stream, _) = listener.accept().unwrap();
            // Until the other has given up.
            let _ = stream.read_to_end(&mut Vec::new());
            let _ = stream.write_all(b"").map(|()| std::thread::sleep(Duration::from_millis(500)));
        })));
    }

    #[test]
    fn a_listener_whose_queue_is_full_is_late() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        // A queue of one (listen(2) counts from nothing), and one that waits in it.
        rustix::net::listen(&listener, 0).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        assert!(is_late(exchange(&path, &Request::List, Duration::from_millis(300), 0).map(|(reply, _)| reply)));
    }

    #[test]
    fn a_reply_without_end_is_refused() {
        let reply = ask(|listener| {
            let (mut stream, _) = listener.accept().unwrap();
            let piece = vec![b'#'; 1 << 16];
            while stream.write_all(&piece).is_ok() {}
        });
        assert!(matches!(reply, Err(Error::Talk { source, .. }) if source.kind() == io::ErrorKind::InvalidData));
    }

    #[test]
    fn a_missing_socket_names_its_path() {
        let error = call(Path::new("/nonexistent/control"), &Request::List).unwrap_err();
        assert_eq!(error.to_string(), "cannot connect to /nonexistent/control");
    }
}
