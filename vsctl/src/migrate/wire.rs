//! What two hosts say to each other, and how it looks on the wire. Knows no server.
//!
//! ```text
//! frame    length of the body (4 bytes, big endian) · kind (1 byte) · body
//! kind 1   a message, as JSON
//! kind 2   a piece of a bulk stream, which an `end` with its length and checksum closes
//! kind 3   nothing but that the side works; its body is empty
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::ladder::Hindrance;
use crate::checksum::{Sum, Summing};
use crate::failure::{self, Exit, Failure};
use crate::interrupt;
use crate::name::Name;
use crate::store::Record;

/// The version of everything here. Both sides must have the same.
pub const PROTOCOL: u32 = 11;

/// The longest body. Both ends allocate that much, so a length that is longer is no frame of ours.
const LONGEST: usize = 1 << 20;

/// The bytes of a bulk stream in one frame.
pub const PIECE: usize = 256 << 10;

const MESSAGE: u8 = 1;
const DATA: u8 = 2;
/// Nothing but that somebody works: a frame without a body, which may come between any two others.
pub const ALIVE: u8 = 3;

/// Which message it is, without what it says.
fn word(message: &Message) -> String {
    format!("{message:?}").split(|letter: char| !letter.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

/// Something one side says. In the order of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// The first word of both sides. Its form never changes, so that every version can refuse every other.
    Hello(Hello),
    /// What is to be moved. Changes nothing.
    Offer(Box<Offer>),
    /// What the target makes of it.
    Checked(Checked),
    /// The template of this name can come.
    Template(Name),
    /// It shall: send it, in a bulk stream.
    SendTemplate,
    /// It is there, and whole.
    TemplateArrived,
    /// Reserve what was offered.
    Prepare,
    /// It is reserved, and its files can come.
    Ready,
    /// All files come, in a bulk stream.
    Files,
    /// A listing of all files comes, and then those that are new in it: two bulk streams.
    Changes,
    /// The same of its root, while the server runs and changes more.
    Again,
    /// Large files that may change again, in a bulk stream: what is there of their blocks?
    Blocks,
    /// This is, in a bulk stream.
    Sums,
    /// What has changed in them, in a bulk stream.
    Patch,
    /// They have come, and more may.
    Arrived,
    /// These were all.
    Whole,
    /// A bulk stream is over, and this is what was sent.
    End(Sum),
    /// All is on the target's disk, and no command there starts it.
    Prepared,
    /// Bring its processes back, and let none of them run.
    Restore(Deal),
    /// The same, with memory that comes meanwhile and later: from now on pieces of data go both ways, and are CRIU's.
    RestoreThin(Deal),
    /// They are there, and stand still.
    Restored,
    /// They have gone on here before: there is nothing to restore any more.
    Spent,
    /// The source has given up its right to run the server: it is the target's.
    Commit(Deal),
    /// It is.
    Committed,
    /// Start it, or let it go on.
    Start,
    /// It runs.
    Started,
    /// All of its memory is there.
    PagesArrived,
    /// Forget what was not committed: the source has kept its right.
    Abort(Deal),
    /// It is forgotten, or was never there.
    Aborted,
    /// It cannot be done, and everything that was done for it has been taken back.
    Failed(Problem),
}

/// Who speaks. Unknown keys are passed over: a later version may say more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The version of `vsctl`, for people.
    pub version: String,
    /// The name of the host, for people.
    pub host: String,
    /// For how many seconds it lets the other side be silent. The shorter one counts for both.
    #[serde(default)]
    pub silence_s: u64,
}

/// What is to be moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// Which server, and in which migration.
    pub deal: Deal,
    /// The text of its `server.toml`.
    pub spec: String,
    /// Its record. The number is the source's: the target gives it one of its own.
    pub record: Record,
    /// The machine's architecture.
    pub architecture: String,
    /// What its files take on the disk, those included in which its memory comes.
    pub size: Size,
    /// How much of that is memory, at most.
    pub memory_bytes: u64,
    /// What its processes need, if they go along.
    pub processes: Option<Processes>,
    /// Whether its memory would come when its processes run already.
    pub is_postcopy: bool,
    /// What its template takes on the disk, if the source would send it.
    pub template: Option<Size>,
}

/// What the target makes of an offer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checked {
    /// What speaks against it; nothing does when it is empty.
    pub problems: Vec<Problem>,
    /// The template is not there, and is to be sent before all else.
    pub wants_template: bool,
}

/// What processes that were begun elsewhere need of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processes {
    /// The CRIU that writes or has written their images: three numbers with dots between.
    pub criu: String,
    /// Their control group, whose path is in the images.
    pub cgroup: String,
    /// What they may have found their processors to have, as `/proc/cpuinfo` says it.
    pub cpu: BTreeSet<String>,
}

/// A server in one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deal {
    /// The server's name.
    pub name: Name,
    /// Its identity for life.
    pub uuid: String,
    /// The migration's own: each attempt has another.
    pub transaction: String,
}

/// What files take on a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Space.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
}

impl Size {
    /// Of both together.
    pub fn with(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_add(other.bytes);
        Self { bytes, entries: self.entries.saturating_add(other.entries) }
    }
}

/// What went wrong, or would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Problem {
    /// The exit code of the command.
    pub exit: u8,
    /// What, and on which object.
    pub message: String,
    /// What can be done about it.
    pub hint: Option<String>,
    /// It speaks only against taking processes along, in this way or in all.
    pub hindrance: Option<Hindrance>,
}

impl Problem {
    /// An error as it crosses the wire.
    pub fn of(error: &anyhow::Error) -> Self {
        let hint = failure::hint_of(error).map(ToOwned::to_owned);
        let hindrance = Hindrance::of(error);
        Self { exit: failure::exit_of(error) as u8, message: format!("{error:#}"), hint, hindrance }
    }

    /// The failure that it is on this side.
    pub fn into_failure(self) -> Failure {
        let failure = Failure::new(Exit::from_code(self.exit), self.message);
        match self.hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(out, " ({hint})"))
    }
}

impl Hello {
    /// What this program says of itself.
    pub fn own(silence_s: u64) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self { protocol: PROTOCOL, version: env!("CARGO_PKG_VERSION").into(), host, silence_s }
    }

    /// Whether the two can talk.
    ///
    /// # Errors
    /// Exit 5 when they speak different versions.
    pub fn check(&self) -> Result<()> {
        if self.protocol == PROTOCOL {
            return Ok(());
        }
        let message = format!(
            "{} has vsctl {}, which speaks version {} of the migration protocol, and this one speaks {PROTOCOL}",
            self.host, self.version, self.protocol
        );
        Err(Failure::new(Exit::Unsupported, message).hint("install the same version on both hosts").into())
    }
}

/// What has arrived.
#[derive(Debug, PartialEq)]
pub enum Frame {
    /// A message.
    Message(Message),
    /// A piece of a bulk stream.
    Data(Vec<u8>),
}

/// The two directions of a connection.
#[derive(Debug)]
pub struct Channel<R, W> {
    pub(super) from: R,
    /// Shared with who says that somebody works.
    pub(super) to: Arc<Mutex<W>>,
}

impl<R: Read, W: Write> Channel<R, W> {
    /// A channel over two pipes.
    pub fn new(from: R, to: W) -> Self {
        Self { from, to: Arc::new(Mutex::new(to)) }
    }

    /// Says something.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn send(&mut self, message: &Message) -> Result<()> {
        log::debug!("says {}", word(message));
        let body = serde_json::to_vec(message).context("write a message as JSON")?;
        self.frame(MESSAGE, &body)
    }

    /// Sends a piece of a bulk stream.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn send_data(&mut self, piece: &[u8]) -> Result<()> {
        self.frame(DATA, piece)
    }

    fn frame(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        if body.len() > LONGEST {
            bail!("a message of {} bytes is too long for the connection", body.len());
        }
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut *to, kind, body).map_err(|error| what_is_wrong(error, "write to the connection"))
    }

    /// Waits for the next frame.
    ///
    /// # Errors
    /// When the connection ends, or carries something else.
    pub fn frame_in(&mut self) -> Result<Frame> {
        loop {
            if let Some(frame) = self.anything_in()? {
                return Ok(frame);
            }
        }
    }

    /// The next frame; none when it says only that somebody works.
    ///
    /// # Errors
    /// As [`Self::frame_in`].
    pub fn anything_in(&mut self) -> Result<Option<Frame>> {
        let mut head = [0; 5];
        self.read(&mut head)?;
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if length > LONGEST || ![MESSAGE, DATA, ALIVE].contains(&head[4]) {
            let said: String = String::from_utf8_lossy(&head).chars().filter(|c| !c.is_control()).collect();
            return Err(Failure::new(
                Exit::Failed,
                format!("the other side speaks no migration protocol: \"{said}…\""),
            )
            .hint("a login shell there must print nothing; `ssh HOST vsctl --version` shows what it says")
            .into());
        }
        let mut body = vec![0; length];
        self.read(&mut body)?;
        match head[4] {
            ALIVE => Ok(None),
            DATA => Ok(Some(Frame::Data(body))),
            _ => serde_json::from_slice(&body)
                .map(|message| Some(Frame::Message(message)))
                .context("read a message of the other side"),
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// As [`Self::frame_in`]; what the other side could not do.
    pub fn receive(&mut self) -> Result<Message> {
        match self.frame_in()? {
            Frame::Message(Message::Failed(problem)) => Err(problem.into_failure().into()),
            Frame::Message(message) => {
                log::debug!("hears {}", word(&message));
                Ok(message)
            }
            Frame::Data(_) => bail!("the other side sends data where a message was expected"),
        }
    }

    /// Waits for one certain message.
    ///
    /// # Errors
    /// As [`Self::receive`]; when it is another.
    pub fn expect(&mut self, expected: &Message) -> Result<()> {
        match self.receive()? {
            message if message == *expected => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Says hello, and listens to who is there.
    ///
    /// # Errors
    /// When the two cannot talk.
    pub fn exchange(&mut self, hello: Hello) -> Result<Hello> {
        self.send(&Message::Hello(hello))?;
        match self.receive()? {
            Message::Hello(hello) => hello.check().map(|()| hello),
            other => Err(unexpected(&other)),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.from.read_exact(bytes).map_err(|error| what_is_wrong(error, "read from the connection"))
    }
}

/// Writes a frame, of which the body is not too long.
///
/// # Errors
/// When nobody takes it.
pub fn write_frame(to: &mut impl Write, kind: u8, body: &[u8]) -> io::Result<()> {
    let mut head = (body.len() as u32).to_be_bytes().to_vec();
    head.push(kind);
    to.write_all(&head)?;
    to.write_all(body)?;
    to.flush()
}

fn what_is_wrong(error: io::Error, doing: &'static str) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => Lost::Ended.into(),
        _ => match error.downcast::<Lost>() {
            Ok(lost) => lost.into(),
            Err(error) => anyhow!(error).context(doing),
        },
    }
}

/// The connection is gone; what it was used for says what that means.
#[derive(Debug, Clone, Copy)]
pub enum Lost {
    /// It has ended.
    Ended,
    /// Nothing has come for so long.
    Silent(Duration),
}

impl fmt::Display for Lost {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => out.write_str("the connection to the other host has ended"),
            Self::Silent(silence) => {
                write!(out, "the other host has said nothing for {} s, and is taken for lost", silence.as_secs_f64())
            }
        }
    }
}

impl std::error::Error for Lost {}

/// Whether the end of the connection is what went wrong, also when a reader of a bulk stream met it.
pub fn is_lost(error: &anyhow::Error) -> bool {
    let wrapped = |cause: &io::Error| cause.get_ref().is_some_and(|inner| inner.is::<Lost>());
    error.is::<Lost>()
        || error.chain().any(|cause| cause.is::<Lost>() || cause.downcast_ref::<io::Error>().is_some_and(wrapped))
}

/// The error for a message out of order.
pub fn unexpected(message: &Message) -> anyhow::Error {
    anyhow!("the other side said something unexpected: {message:?}")
}

/// Sends all of `from` as a bulk stream, and then its sum. `moved` hears how many bytes have gone.
///
/// # Errors
/// When `from` cannot be read, or the connection is gone.
fn send_bulk<R: Read, W: Write>(
    channel: &mut Channel<R, W>,
    from: &mut dyn Read,
    moved: &mut dyn FnMut(u64),
) -> Result<Sum> {
    let mut summed = Summing::default();
    let mut piece = vec![0; PIECE];
    loop {
        let length = match from.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("read what is to be sent"),
        };
        summed.add(&piece[..length]);
        channel.send_data(&piece[..length])?;
        interrupt::check()?;
        moved(summed.bytes());
    }
    Ok(summed.sum())
}

/// Sends a bulk stream with its end, and says how long it was. Where the other side has ended because of something, it has said that before.
///
/// # Errors
/// When `from` cannot be read, or the connection is gone.
pub fn send_whole<R: Read, W: Write>(
    channel: &mut Channel<R, W>,
    from: &mut dyn Read,
    moved: &mut dyn FnMut(u64),
) -> Result<u64> {
    let sum = stream(channel, from, moved)?;
    let bytes = sum.bytes;
    channel.send(&Message::End(sum)).map(|()| bytes)
}

/// The same without its end.
///
/// # Errors
/// When `from` cannot be read, or the connection is gone.
pub fn stream<R: Read, W: Write>(
    channel: &mut Channel<R, W>,
    from: &mut dyn Read,
    moved: &mut dyn FnMut(u64),
) -> Result<Sum> {
    match send_bulk(channel, from, moved) {
        Err(error) if matches!(error.downcast_ref(), Some(Lost::Ended)) => {
            Err(channel.receive().err().unwrap_or(error))
        }
        sent => sent,
    }
}

/// A bulk stream that arrives, as a reader. It ends when the sender has said its sum, which must be that of what came.
#[derive(Debug)]
pub struct Bulk<'a, R, W> {
    channel: &'a mut Channel<R, W>,
    piece: Vec<u8>,
    at: usize,
    summed: Summing,
    has_ended: bool,
}

impl<'a, R: Read, W: Write> Bulk<'a, R, W> {
    /// The stream that comes next on `channel`.
    pub fn new(channel: &'a mut Channel<R, W>) -> Self {
        Self { channel, piece: Vec::new(), at: 0, summed: Summing::default(), has_ended: false }
    }

    fn next(&mut self) -> Result<()> {
        match self.channel.frame_in()? {
            Frame::Data(piece) => {
                self.summed.add(&piece);
                self.piece = piece;
                self.at = 0;
            }
            Frame::Message(Message::End(told)) => {
                let came = std::mem::take(&mut self.summed).sum();
                if came != told {
                    bail!("{} bytes arrived, and they are not the {} that were sent", came.bytes, told.bytes);
                }
                self.has_ended = true;
            }
            Frame::Message(Message::Failed(problem)) => return Err(problem.into_failure().into()),
            Frame::Message(other) => return Err(unexpected(&other)),
        }
        Ok(())
    }
}

impl<R: Read, W: Write> Read for Bulk<'_, R, W> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() && !self.has_ended {
            self.next().map_err(|error| match error.downcast::<Lost>() {
                Ok(lost) => io::Error::new(io::ErrorKind::UnexpectedEof, lost),
                Err(error) => io::Error::other(error),
            })?;
        }
        let length = into.len().min(self.piece.len() - self.at);
        into[..length].copy_from_slice(&self.piece[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deal() -> Deal {
        Deal { name: "web1".parse().unwrap(), uuid: "u".into(), transaction: "t".into() }
    }

    fn offer() -> Offer {
        let record = Record {
            version: 1,
            id: 7,
            uuid: "u".into(),
            created_s: 1,
            template_digest: "d".into(),
            addresses: vec!["10.1.2.3/24".parse().unwrap()],
        };
        Offer {
            deal: deal(),
            spec: "template = \"busybox\"\n".into(),
            record,
            architecture: "x86_64".into(),
            size: Size { bytes: 4096, entries: 2 },
            memory_bytes: 1024,
            processes: Some(Processes {
                criu: "4.1.1".into(),
                cgroup: "vsos/web1".into(),
                cpu: ["avx".to_owned(), "sse".to_owned()].into(),
            }),
            is_postcopy: false,
            template: Some(Size { bytes: 8192, entries: 3 }),
        }
    }

    /// Every message with its text: another vsctl of the same protocol must understand it.
    fn golden() -> Vec<(Message, &'static str)> {
        let problem = Problem { exit: 43, message: "there".into(), hint: None, hindrance: Some(Hindrance::Room) };
        vec![
            (
                Message::Hello(Hello { protocol: 9, version: "0.1.0".into(), host: "a".into(), silence_s: 120 }),
                r#"{"hello":{"protocol":9,"version":"0.1.0","host":"a","silence_s":120}}"#,
            ),
            (
                Message::Offer(Box::new(offer())),
                concat!(
                    r#"{"offer":{"deal":{"name":"web1","uuid":"u","transaction":"t"},"#,
                    r#""spec":"template = \"busybox\"\n","#,
                    r#""record":{"version":1,"id":7,"uuid":"u","created_s":1,"template_digest":"d","addresses":["10.1.2.3/24"]},"#,
                    r#""architecture":"x86_64","size":{"bytes":4096,"entries":2},"memory_bytes":1024,"#,
                    r#""processes":{"criu":"4.1.1","cgroup":"vsos/web1","cpu":["avx","sse"]},"#,
                    r#""is_postcopy":false,"template":{"bytes":8192,"entries":3}}}"#
                ),
            ),
            (
                Message::Checked(Checked { problems: vec![problem.clone()], wants_template: true }),
                concat!(
                    r#"{"checked":{"problems":[{"exit":43,"message":"there","hint":null,"hindrance":"room"}],"#,
                    r#""wants_template":true}}"#
                ),
            ),
            (Message::Template("busybox".parse().unwrap()), r#"{"template":"busybox"}"#),
            (Message::SendTemplate, r#""send-template""#),
            (Message::TemplateArrived, r#""template-arrived""#),
            (Message::Prepare, r#""prepare""#),
            (Message::Ready, r#""ready""#),
            (Message::Files, r#""files""#),
            (Message::Changes, r#""changes""#),
            (Message::Again, r#""again""#),
            (Message::Blocks, r#""blocks""#),
            (Message::Sums, r#""sums""#),
            (Message::Patch, r#""patch""#),
            (Message::Arrived, r#""arrived""#),
            (Message::Whole, r#""whole""#),
            (Message::End(Sum { bytes: 3, xxh3: "ab".into() }), r#"{"end":{"bytes":3,"xxh3":"ab"}}"#),
            (Message::Prepared, r#""prepared""#),
            (Message::Restore(deal()), r#"{"restore":{"name":"web1","uuid":"u","transaction":"t"}}"#),
            (Message::RestoreThin(deal()), r#"{"restore-thin":{"name":"web1","uuid":"u","transaction":"t"}}"#),
            (Message::Restored, r#""restored""#),
            (Message::Spent, r#""spent""#),
            (Message::Commit(deal()), r#"{"commit":{"name":"web1","uuid":"u","transaction":"t"}}"#),
            (Message::Committed, r#""committed""#),
            (Message::Start, r#""start""#),
            (Message::Started, r#""started""#),
            (Message::PagesArrived, r#""pages-arrived""#),
            (Message::Abort(deal()), r#"{"abort":{"name":"web1","uuid":"u","transaction":"t"}}"#),
            (Message::Aborted, r#""aborted""#),
            (Message::Failed(problem), r#"{"failed":{"exit":43,"message":"there","hint":null,"hindrance":"room"}}"#),
        ]
    }

    #[test]
    fn every_message_has_its_agreed_form_and_comes_back() {
        for (message, text) in golden() {
            assert_eq!(serde_json::to_string(&message).unwrap(), text);
            assert_eq!(serde_json::from_str::<Message>(text).unwrap(), message);
        }
    }

    #[test]
    fn frames_have_their_agreed_bytes() {
        let mut channel = Channel::new(io::empty(), Vec::new());
        channel.send(&Message::Ready).unwrap();
        write_frame(&mut *channel.to.lock().unwrap(), ALIVE, &[]).unwrap();
        channel.send_data(b"abc").unwrap();
        assert_eq!(*channel.to.lock().unwrap(), b"\0\0\0\x07\x01\"ready\"\0\0\0\0\x03\0\0\0\x03\x02abc");
        let sent = channel.to.lock().unwrap();
        let mut back = Channel::new(&sent[..], io::sink());
        assert_eq!(back.frame_in().unwrap(), Frame::Message(Message::Ready));
        assert_eq!(back.frame_in().unwrap(), Frame::Data(b"abc".to_vec()));
        assert!(back.frame_in().unwrap_err().is::<Lost>());
    }

    /// What a bulk stream of `content` is on the wire.
    fn sent(content: &[u8]) -> Vec<u8> {
        let mut channel = Channel::new(io::empty(), Vec::new());
        let mut last = 0;
        let sum = send_bulk(&mut channel, &mut &content[..], &mut |bytes| last = bytes).unwrap();
        assert_eq!((sum.bytes, last), (content.len() as u64, content.len() as u64));
        channel.send(&Message::End(sum)).unwrap();
        channel.to.lock().unwrap().clone()
    }

    fn arrived(bytes: &[u8]) -> Result<Vec<u8>, io::Error> {
        let mut content = Vec::new();
        Bulk::new(&mut Channel::new(bytes, io::sink())).read_to_end(&mut content).map(|_| content)
    }

    #[test]
    fn a_bulk_stream_arrives_whole_or_not_at_all() {
        for length in [0, 1, PIECE, 3 * PIECE + 5] {
            let content: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            assert!(arrived(&sent(&content)).unwrap() == content, "{length}");
        }
        let whole = sent(b"some bytes of a volume");
        assert!(is_lost(&arrived(&whole[..whole.len() - 1]).unwrap_err().into()));
        let mut damaged = whole.clone();
        damaged[8] ^= 1;
        assert!(arrived(&damaged).unwrap_err().to_string().contains("not the 22"));
        assert!(arrived(&whole).is_ok());
    }

    #[test]
    fn another_version_is_refused_and_what_else_it_says_passed_over() {
        let text = r#"{"hello":{"protocol":99,"version":"9.0","host":"b","more":[1]}}"#;
        let Message::Hello(hello) = serde_json::from_str(text).unwrap() else { panic!("no hello") };
        let error = hello.check().unwrap_err();
        assert_eq!(failure::exit_of(&error), Exit::Unsupported);
        assert!(error.to_string().contains("vsctl 9.0") && error.to_string().contains("version 99"), "{error}");
    }

    #[test]
    fn what_is_no_frame_is_shown() {
        let error = Channel::new(&b"bash: vsctl: command not found\n"[..], io::sink()).frame_in().unwrap_err();
        assert!(error.to_string().contains("\"bash:"), "{error}");
    }

    #[test]
    fn a_problem_keeps_its_code_and_hint_across_the_wire() {
        let error = anyhow!(Failure::new(Exit::NoTemplate, "none").hint("make it")).context("cannot take 'web1'");
        let back = anyhow!(Problem::of(&error).into_failure());
        assert_eq!(failure::exit_of(&back), Exit::NoTemplate);
        assert_eq!(failure::hint_of(&back), Some("make it"));
        assert_eq!(back.to_string(), "cannot take 'web1': none");
    }
}
