//! A program that writes down what it is told, and one that tells it: between them a connection that has to last, and a file in which
//! nothing may be missing that was answered.
//!
//! ```text
//! TESTS dialogue serve PORT FILE             in a server: appends each line that comes to FILE, on the disk, and only then answers with it
//! TESTS dialogue ask FROM ADDRESS:PORT FILE  outside: tells 1, 2, 3, … on one connection from the address FROM; appends each number
//!                                            that was answered to FILE, with the milliseconds that it took
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};

/// Between an answer and the next number.
const PAUSE: Duration = Duration::from_millis(20);

/// Runs what the command line asks for, when it is about dialogues.
///
/// # Errors
/// When the connection ends, or answers something else.
pub fn run(words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", port, file] => serve(port.parse().context("a port")?, Path::new(file)),
        ["ask", from, to, file] => {
            ask(from.parse().context("an address")?, to.parse().context("a port")?, Path::new(file))
        }
        _ => bail!("serve PORT FILE, or ask FROM ADDRESS:PORT FILE"),
    }
}

fn appending(file: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(file).with_context(|| format!("open {}", file.display()))
}

fn serve(port: u16, file: &Path) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("listen")?;
    let mut kept = appending(file)?;
    for connection in listener.incoming() {
        let mut connection = connection.context("accept a connection")?;
        for line in BufReader::new(connection.try_clone()?).lines() {
            let line = line.context("hear")? + "\n";
            kept.write_all(line.as_bytes()).and_then(|()| kept.sync_data()).context("write down")?;
            connection.write_all(line.as_bytes()).context("answer")?;
        }
    }
    Ok(())
}

fn ask(from: Ipv4Addr, to: SocketAddrV4, file: &Path) -> Result<()> {
    let mut kept = appending(file)?;
    // An address of its own choice: std connects from whichever the route says.
    let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("make a socket")?;
    bind(made.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(from, 0))).with_context(|| format!("bind to {from}"))?;
    connect(made.as_raw_fd(), &SockaddrIn::from(to)).with_context(|| format!("connect to {to}"))?;
    let mut connection = TcpStream::from(made);
    let mut answers = BufReader::new(connection.try_clone()?);
    for number in 1_u64.. {
        let began = Instant::now();
        let told = format!("{number}\n");
        connection.write_all(told.as_bytes()).context("tell")?;
        let mut answer = String::new();
        answers.read_line(&mut answer).context("hear an answer")?;
        ensure!(answer == told, "{answer:?} is no answer to {number}");
        writeln!(kept, "{number} {}", began.elapsed().as_millis()).context("write down")?;
        thread::sleep(PAUSE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_answered_was_written_down_before() {
        let directory = tempfile::tempdir().unwrap();
        let (kept, answered) = (directory.path().join("kept"), directory.path().join("answered"));
        // A port that was free a moment ago.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let served = kept.clone();
        thread::spawn(move || serve(port, &served));
        let asked = answered.clone();
        thread::spawn(move || {
            while ask(Ipv4Addr::LOCALHOST, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), &asked).is_err() {
                thread::sleep(PAUSE);
            }
        });
        let lines = |file: &Path| std::fs::read_to_string(file).unwrap_or_default().lines().count();
        let end = Instant::now() + Duration::from_secs(30);
        while lines(&answered) < 5 && Instant::now() < end {
            thread::sleep(PAUSE);
        }
        let answers = lines(&answered);
        assert!(answers >= 5 && lines(&kept) >= answers);
        assert!(std::fs::read_to_string(&kept).unwrap().starts_with("1\n2\n3\n"));
    }
}
