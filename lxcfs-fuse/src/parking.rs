//! What the supervisor keeps for the manager: the listeners of servers whose system calls are answered here, and the consoles of
//! servers whose init keeps none.
//!
//! A listener must not be closed while its server runs: the calls would not exist any more (ENOSYS). So the server's monitor
//! keeps it and the supervisor does, and each can have it again from the other. `DIR/listeners` is the door, for root only;
//! one packet a message (unix(7), `SOCK_SEQPACKET`), and nothing is kept of a caller after it:
//!
//! ```text
//! caller → supervisor   `park ID`,  with a listener and the memory of its slot     (no answer)
//! caller → supervisor   `fetch ID`
//! supervisor → caller   `parked`,   with a listener and a slot, for each of server ID; then the end
//! caller → supervisor   `keep ID INIT`,  with its consoles in their order, in the place of what was kept   (no answer)
//! caller → supervisor   `give ID INIT`
//! supervisor → caller   `kept`,     with the consoles of server ID, if its init has always been INIT
//! caller → supervisor   `drop ID`                                                                          (no answer)
//! caller → supervisor   `reload PROGRAM`
//! supervisor → caller   `reloaded VERSION`, or `refused WHY`
//! ```
//!
//! INIT is whatever names one init of that server and no later one. A worker gets all listeners, and says of each when nobody is
//! left behind it; consoles are for monitors only.
//!
//! Limit: does not look at what it keeps. A listener is two descriptors, so the limit on those is the limit here.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use kernel::channel::{Channel, Door};

/// How many lines one packet to a worker carries.
const LINES_PER_PACKET: usize = 100;

/// Callers that have connected and not said anything yet; one more makes the first one leave.
const CALLERS_MAX: usize = 64;

/// The word with which lines are handed to a worker: `lines NUMBER:SERVER …`, each with its two descriptors.
pub const LINES: &str = "lines";

/// The word that asks for another program.
const RELOAD: &[u8] = b"reload ";

/// What callers have said that the supervisor must see to.
#[derive(Debug, Default)]
pub struct Heard {
    /// The numbers of new lines.
    pub lines: Vec<u64>,
    /// Another program is wanted in the supervisor's place.
    pub reload: Option<Reload>,
}

/// The wish for another program.
#[derive(Debug)]
pub struct Reload {
    /// Who waits for `reloaded` or `refused`.
    pub caller: Channel,
    /// The path of the program.
    pub program: PathBuf,
}

impl Reload {
    /// Says that it will not be.
    pub fn refuse(&self, why: &anyhow::Error) {
        log::error!("refused to reload: {why:#}");
        // Who does not wait for it any more can read the log.
        let _ = self.caller.send(format!("refused {why:#}").as_bytes(), &[]);
    }
}

/// A listener and its slot.
#[derive(Debug)]
struct Line {
    server: u64,
    listener: OwnedFd,
    slot: OwnedFd,
}

/// All that is kept, and the door.
#[derive(Debug)]
pub struct Parking {
    door: Door,
    callers: Vec<Channel>,
    lines: BTreeMap<u64, Line>,
    next: u64,
    /// By server.
    consoles: BTreeMap<u64, Consoles>,
}

/// The consoles of one life of a server.
#[derive(Debug)]
struct Consoles {
    init: u64,
    descriptors: Vec<OwnedFd>,
}

impl Parking {
    /// Opens the door at `path`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(path: &Path) -> Result<Parking, kernel::Error> {
        Door::open(path).map(Parking::at)
    }

    /// Nothing is kept yet behind this door.
    pub fn at(door: Door) -> Parking {
        Parking { door, callers: Vec::new(), lines: BTreeMap::new(), next: 1, consoles: BTreeMap::new() }
    }

    /// Leaves everything to the next program.
    ///
    /// # Errors
    /// When it does not fit into `next`.
    pub fn leave(&self, next: &Channel) -> Result<(), kernel::Error> {
        next.send(b"door", &[self.door.as_fd()])?;
        self.hand_over(next.as_fd(), &self.all())?;
        // Who was cut off would take it for an answer.
        self.callers.iter().try_for_each(|caller| next.send(b"visitor", &[caller.as_fd()]))?;
        self.consoles.iter().try_for_each(|(server, kept)| {
            let descriptors: Vec<_> = kept.descriptors.iter().map(AsFd::as_fd).collect();
            next.send(format!("keep {server} {}", kept.init).as_bytes(), &descriptors)
        })
    }

    /// Takes one of the packets in which lines, consoles and callers were left.
    ///
    /// # Errors
    /// When it is none.
    pub fn find(&mut self, packet: &[u8], descriptors: Vec<OwnedFd>) -> anyhow::Result<()> {
        let words: Vec<&str> = std::str::from_utf8(packet)?.split(' ').collect();
        match words[..] {
            [LINES, ..] => {
                for (number, server, listener, slot) in lines(packet, descriptors).context("lines without listeners")? {
                    self.lines.insert(number, Line { server, listener, slot });
                    self.next = self.next.max(number + 1);
                }
            }
            ["keep", server, init] => {
                self.consoles.insert(server.parse()?, Consoles { init: init.parse()?, descriptors });
            }
            ["visitor"] => self.callers.extend(descriptors.into_iter().map(Channel::from)),
            _ => bail!("'{}' is nothing that is kept", packet.escape_ascii()),
        }
        Ok(())
    }

    /// All that is kept, in words.
    #[cfg(test)]
    pub fn kept(&self) -> Vec<String> {
        let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
        let line = |(number, line): (&u64, &Line)| {
            format!("line {number} of {}: {} {}", line.server, inode(line.listener.as_fd()), inode(line.slot.as_fd()))
        };
        let consoles = |(server, kept): (&u64, &Consoles)| {
            let descriptors: Vec<_> = kept.descriptors.iter().map(|fd| inode(fd.as_fd())).collect();
            format!("consoles of {server} in {}: {descriptors:?}", kept.init)
        };
        let caller = |caller: &Channel| format!("caller {}", inode(caller.as_fd()));
        let lines = self.lines.iter().map(line).chain(self.consoles.iter().map(consoles));
        lines.chain(self.callers.iter().map(caller)).collect()
    }

    /// What to wait for, to read from.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.door.as_fd()).chain(self.callers.iter().map(AsFd::as_fd))
    }

    /// Hears whoever has come.
    pub fn serve(&mut self) -> Heard {
        loop {
            match self.door.accept() {
                Ok(Some(caller)) => self.callers.push(caller),
                Ok(None) => break,
                Err(error) => {
                    log::error!("{error}");
                    break;
                }
            }
        }
        let mut heard = Heard::default();
        for caller in std::mem::take(&mut self.callers) {
            match caller.receive_within(0) {
                Ok(Some((words, _))) if words.starts_with(RELOAD) => {
                    let program = OsString::from_vec(words[RELOAD.len()..].to_vec()).into();
                    heard.reload = Some(Reload { caller, program });
                }
                Ok(Some((words, descriptors))) => heard.lines.extend(self.hear(&caller, &words, descriptors)),
                Ok(None) => self.callers.push(caller),
                Err(error) => log::warn!("{error}"),
            }
        }
        let surplus = self.callers.len().saturating_sub(CALLERS_MAX);
        self.callers.drain(..surplus);
        heard
    }

    fn hear(&mut self, caller: &Channel, words: &[u8], descriptors: Vec<OwnedFd>) -> Option<u64> {
        let words = String::from_utf8_lossy(words);
        let (word, numbers) = words.split_once(' ').unwrap_or((&words, ""));
        let numbers: Result<Vec<u64>, _> = numbers.split_ascii_whitespace().map(str::parse).collect();
        match (word, numbers.as_deref(), descriptors.len()) {
            ("park", Ok(&[server]), 2) => {
                let [listener, slot] = <[OwnedFd; 2]>::try_from(descriptors).ok()?;
                return Some(self.park(server, listener, slot));
            }
            ("fetch", Ok(&[server]), 0) => self.show(caller, server),
            ("keep", Ok(&[server, init]), 1..) => drop(self.consoles.insert(server, Consoles { init, descriptors })),
            ("give", Ok(&[server, init]), 0) => self.give(caller, server, init),
            ("drop", Ok(&[server]), 0) => drop(self.consoles.remove(&server)),
            // Gone again without a word.
            ("", ..) => {}
            _ => log::warn!("somebody asks for '{}'", words.escape_debug()),
        }
        None
    }

    fn give(&self, caller: &Channel, server: u64, init: u64) {
        let kept = self.consoles.get(&server).filter(|kept| kept.init == init);
        let descriptors: Vec<_> = kept.iter().flat_map(|kept| &kept.descriptors).map(AsFd::as_fd).collect();
        if let Err(error) = caller.send(b"kept", &descriptors) {
            log::warn!("give back the consoles of server {server}: {error}");
        }
    }

    fn park(&mut self, server: u64, listener: OwnedFd, slot: OwnedFd) -> u64 {
        let number = self.next;
        self.next += 1;
        self.lines.insert(number, Line { server, listener, slot });
        number
    }

    fn show(&self, caller: &Channel, server: u64) {
        for line in self.lines.values().filter(|line| line.server == server) {
            // It does not block: who does not read gets no more.
            if let Err(error) = caller.send(b"parked", &[line.listener.as_fd(), line.slot.as_fd()]) {
                log::warn!("give back the listeners of server {server}: {error}");
                return;
            }
        }
    }

    /// Forgets a line behind which nobody is left.
    pub fn forget(&mut self, number: u64) {
        self.lines.remove(&number);
    }

    /// The numbers of all lines.
    pub fn all(&self) -> Vec<u64> {
        self.lines.keys().copied().collect()
    }

    /// Hands lines to a worker.
    ///
    /// # Errors
    /// When it does not take them.
    pub fn hand_over(&self, worker: BorrowedFd<'_>, numbers: &[u64]) -> Result<(), kernel::Error> {
        let lines: Vec<(&u64, &Line)> = numbers.iter().filter_map(|number| self.lines.get_key_value(number)).collect();
        for lines in lines.chunks(LINES_PER_PACKET) {
            let mut words = LINES.to_owned();
            let mut descriptors = Vec::with_capacity(2 * lines.len());
            for (number, line) in lines {
                words += &format!(" {number}:{}", line.server);
                descriptors.extend([line.listener.as_fd(), line.slot.as_fd()]);
            }
            kernel::channel::send(worker, words.as_bytes(), &descriptors)?;
        }
        Ok(())
    }
}

/// What a packet with [`LINES`] says: number, server, listener and slot of each; `None` when it is none.
pub fn lines(words: &[u8], descriptors: Vec<OwnedFd>) -> Option<Vec<(u64, u64, OwnedFd, OwnedFd)>> {
    let words = std::str::from_utf8(words).ok()?.strip_prefix(LINES)?;
    let mut descriptors = descriptors.into_iter();
    let line = |word: &str| {
        let (number, server) = word.split_once(':')?;
        Some((number.parse().ok()?, server.parse().ok()?, descriptors.next()?, descriptors.next()?))
    };
    words.split_ascii_whitespace().map(line).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    pub(crate) fn inode(fd: impl AsFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    pub(crate) fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn what_is_parked_is_handed_over_and_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("listeners");
        let mut parking = Parking::open(&path).unwrap();
        let (listener, slot) = (file(), file());
        let parked = kernel::channel::knock(&path).unwrap();
        parked.send(b"park 7", &[listener.as_fd(), slot.as_fd()]).unwrap();
        kernel::channel::knock(&path).unwrap().send(b"park 8", &[file().as_fd(), file().as_fd()]).unwrap();
        assert_eq!(parking.serve().lines, [1, 2]);

        let (ours, worker) = kernel::channel::pair().unwrap();
        parking.hand_over(ours.as_fd(), &parking.all()).unwrap();
        let (words, descriptors) = worker.receive().unwrap();
        let mut handed = lines(&words, descriptors).unwrap().into_iter();
        let (number, server, first, second) = handed.next().unwrap();
        assert_eq!((number, server, inode(first), inode(second)), (1, 7, inode(&listener), inode(&slot)));
        assert_eq!(handed.next().map(|line| (line.0, line.1)), Some((2, 8)));

        let asking = kernel::channel::knock(&path).unwrap();
        asking.send(b"fetch 7", &[]).unwrap();
        assert!(parking.serve().lines.is_empty());
        let (words, descriptors) = asking.receive().unwrap();
        assert_eq!((words.as_slice(), descriptors.len()), (b"parked".as_slice(), 2));
        assert_eq!(inode(&descriptors[0]), inode(&listener));
        assert_eq!(asking.receive().unwrap().0, b"");
        parking.forget(1);
        assert_eq!(parking.all(), [2]);
    }

    #[test]
    fn consoles_are_given_back_to_the_same_life_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("listeners");
        let mut parking = Parking::open(&path).unwrap();
        let consoles = [file(), file(), file()];
        let mut ask = |words: &str, descriptors: &[BorrowedFd<'_>]| {
            let caller = kernel::channel::knock(&path).unwrap();
            caller.send(words.as_bytes(), descriptors).unwrap();
            assert!(parking.serve().lines.is_empty());
            let (_, given) = caller.receive().unwrap();
            given.iter().map(inode).collect::<Vec<_>>()
        };
        let wanted: Vec<_> = consoles.iter().map(inode).collect();
        ask("keep 7 1000", &[file().as_fd()]);
        ask("keep 7 1000", &consoles.each_ref().map(AsFd::as_fd));
        assert_eq!(ask("give 7 1000", &[]), wanted);
        // It gives copies: they can be had again.
        assert_eq!(ask("give 7 1000", &[]), wanted);
        assert!(ask("give 7 1001", &[]).is_empty() && ask("give 8 1000", &[]).is_empty());
        ask("drop 7", &[]);
        assert!(ask("give 7 1000", &[]).is_empty());
    }

    #[test]
    fn many_lines_go_in_few_packets_and_nonsense_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("listeners");
        let mut parking = Parking::open(&path).unwrap();
        for server in 0..250 {
            parking.park(server, file(), file());
        }
        let (ours, worker) = kernel::channel::pair().unwrap();
        parking.hand_over(ours.as_fd(), &parking.all()).unwrap();
        let mut packets = Vec::new();
        while let Some((words, descriptors)) = worker.receive_within(0).unwrap() {
            packets.push(lines(&words, descriptors).unwrap().len());
        }
        assert_eq!(packets, [100, 100, 50]);
        for nonsense in ["park", "park x", "fetch -1", "dance 3", "park 3", "keep 3 1", "give 3", "drop"] {
            kernel::channel::knock(&path).unwrap().send(nonsense.as_bytes(), &[]).unwrap();
        }
        assert!(parking.serve().lines.is_empty() && parking.all().len() == 250);
        assert!(parking.descriptors().all(|fd| fd.as_raw_fd() > 2) && parking.descriptors().count() == 1);
    }
}
