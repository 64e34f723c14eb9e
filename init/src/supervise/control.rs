//! The server's side of the control socket: connections, until their request is complete.
//!
//! Nothing here waits: a client that is slow, silent or many loses its connection and harms
//! nobody else.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use init::control::{MAX_REQUEST_BYTES, Reply, Request};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// More at a time are not served; the oldest that has not said its request goes.
const MAX_CLIENTS: usize = 32;

/// How long a client may take to say its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The socket and its connections.
pub struct Control {
    listener: UnixListener,
    clients: Vec<Client>,
}

struct Client {
    stream: UnixStream,
    request: Vec<u8>,
    since: Instant,
    phase: Phase,
}

#[derive(PartialEq)]
enum Phase {
    /// Its request is not complete.
    Reading,
    /// It waits for what becomes of a service.
    Waiting(Goal),
    /// It got its reply, or nothing.
    Finished,
}

/// What a client waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Goal {
    /// The service is up, or will not be soon.
    Started(String),
    /// The service is down.
    Stopped(String),
}

impl Control {
    /// Binds the socket for root alone.
    pub fn bind(path: &Path) -> io::Result<Control> {
        // One that a process of before left.
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Control { listener, clients: Vec::new() })
    }

    /// Takes new connections; indices may change.
    pub fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS {
                let oldest = self.clients.iter().position(|c| c.phase == Phase::Reading);
                self.clients.remove(oldest.unwrap_or(0));
            }
            if stream.set_nonblocking(true).is_ok() {
                let since = Instant::now();
                let request = Vec::new();
                self.clients.push(Client { stream, request, since, phase: Phase::Reading });
            }
        }
    }

    /// The connections that are still to say something.
    pub fn reading(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let clients = self.clients.iter().enumerate();
        clients.filter(|(_, c)| c.phase == Phase::Reading).map(|(i, c)| (i, c.stream.as_fd()))
    }

    /// Reads on; the request when it is complete.
    pub fn read(&mut self, index: usize) -> Option<Result<Request, String>> {
        let client = self.clients.get_mut(index)?;
        let mut buffer = [0; 1024];
        loop {
            match client.stream.read(&mut buffer) {
                Ok(0) => return Some(parse(&client.request)),
                Ok(length) => client.request.extend_from_slice(buffer.get(..length)?),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    client.phase = Phase::Finished;
                    return None;
                }
            }
            if client.request.len() > MAX_REQUEST_BYTES {
                return Some(Err("the request is too long".into()));
            }
        }
    }

    /// Answers, with descriptors, and ends the connection.
    pub fn reply(&mut self, index: usize, reply: &Reply, descriptors: &[BorrowedFd]) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        client.phase = Phase::Finished;
        if let Err(error) = send(&client.stream, reply, descriptors) {
            log::debug!("a client of the control socket got no reply: {error}");
        }
    }

    /// Keeps the client until the goal is reached.
    pub fn keep(&mut self, index: usize, goal: Goal) {
        if let Some(client) = self.clients.get_mut(index) {
            client.phase = Phase::Waiting(goal);
        }
    }

    /// The clients that wait, and for what.
    pub fn waiting(&self) -> Vec<(usize, Goal)> {
        let goal = |client: &Client| match &client.phase {
            Phase::Waiting(goal) => Some(goal.clone()),
            _ => None,
        };
        self.clients.iter().enumerate().filter_map(|(i, c)| Some((i, goal(c)?))).collect()
    }

    /// Forgets the connections that are over; indices change.
    pub fn drop_finished(&mut self) {
        self.clients.retain(|client| client.phase != Phase::Finished);
    }

    /// When the next silent client loses its connection.
    pub fn deadline(&self) -> Option<Instant> {
        let reading = self.clients.iter().filter(|client| client.phase == Phase::Reading);
        reading.map(|client| client.since + REQUEST_TIMEOUT).min()
    }

    /// Ends the connections of those that took too long.
    pub fn drop_late(&mut self, now: Instant) {
        let is_late = |c: &Client| c.phase == Phase::Reading && c.since + REQUEST_TIMEOUT <= now;
        self.clients.retain(|client| !is_late(client));
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

fn parse(request: &[u8]) -> Result<Request, String> {
    let text = std::str::from_utf8(request).map_err(|_| "the request is not UTF-8")?;
    toml::from_str(text).map_err(|error| format!("not a request: {}", error.message()))
}

/// One send: replies are shorter than a socket's buffer, so it takes all or fails.
fn send(stream: &UnixStream, reply: &Reply, descriptors: &[BorrowedFd]) -> io::Result<()> {
    let text = toml::to_string(reply).map_err(io::Error::other)?;
    let rights = SendAncillaryMessage::ScmRights(descriptors);
    let mut space = vec![MaybeUninit::uninit(); rights.size()];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(rights);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = sendmsg(stream, &[IoSlice::new(text.as_bytes())], &mut ancillary, flags)?;
    match sent == text.len() {
        true => Ok(()),
        false => Err(io::Error::from(io::ErrorKind::WriteZero)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (tempfile::TempDir, Control, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let mut control = Control::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        control.accept();
        (directory, control, client)
    }

    #[test]
    fn a_request_is_complete_when_the_client_has_ended_it() {
        use std::io::Write;
        let (_directory, mut control, mut client) = pair();
        client.write_all(b"request = ").unwrap();
        assert_eq!(control.read(0), None);
        client.write_all(b"\"list\"").unwrap();
        assert_eq!(control.read(0), None);
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(control.read(0), Some(Ok(Request::List)));
        control.reply(0, &Reply::Done, &[]);
        control.drop_finished();
        let mut reply = String::new();
        client.read_to_string(&mut reply).unwrap();
        assert_eq!(reply, "reply = \"done\"\n");
    }

    #[test]
    fn nonsense_and_length_are_refused() {
        use std::io::Write;
        let (_directory, mut control, mut client) = pair();
        client.write_all(&vec![b'#'; MAX_REQUEST_BYTES + 1]).unwrap();
        assert_eq!(control.read(0), Some(Err("the request is too long".into())));
        assert!(parse(b"request = \"explode\"").is_err());
        assert!(parse(b"request = \"stop\"\nname = \"a\"\nx = 1").is_err());
        assert!(parse(&[0xff]).is_err());
    }

    #[test]
    fn too_many_clients_push_out_the_oldest() {
        let (directory, mut control, first) = pair();
        let path = directory.path().join("control");
        let others: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        control.accept();
        assert_eq!(control.clients.len(), MAX_CLIENTS);
        let mut first = first;
        assert_eq!(first.read(&mut [0; 1]).unwrap(), 0);
        drop(others);
    }

    #[test]
    fn a_silent_client_loses_its_connection() {
        let (_directory, mut control, _client) = pair();
        let deadline = control.deadline().unwrap();
        control.drop_late(deadline - Duration::from_millis(1));
        assert_eq!(control.clients.len(), 1);
        control.drop_late(deadline);
        assert!(control.clients.is_empty());
    }
}
