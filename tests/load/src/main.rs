//! What the lab runs in servers and hosts while it measures.
//!
//! ```text
//! serve ADDRESS MIB KIB      in a server: a datagram to ADDRESS every 10 ms; holds MIB of memory, and changes KIB of it a second
//! listen ADDRESS             on a host: a line with the milliseconds of each silence, and a line `.` for every hundred datagrams
//! count FILE PROGRAM WORDS…  on a host, between vsctl and PROGRAM: the bytes that go to its standard input, into FILE
//! ```

#![forbid(unsafe_code)]

use std::{
    error::Error,
    fs,
    hint::black_box,
    io::{self, Read, Write},
    net::UdpSocket,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Between two datagrams.
const TICK: Duration = Duration::from_millis(10);
/// What is a silence, and not a processor that was busy with another program.
const SILENCE: Duration = Duration::from_millis(30);
/// How many datagrams are told by one line.
const TOLD: u64 = 100;
const PAGE: usize = 4096;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["serve", address, mib, kib] => serve(address, mib, kib),
        ["listen", address] => listen(address),
        ["count", file, program, ref arguments @ ..] => return count(file, program, arguments),
        _ => Err("serve ADDRESS MIB KIB, listen ADDRESS, or count FILE PROGRAM WORDS...".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(address: &str, mib: &str, kib: &str) -> Result<(), Box<dyn Error>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut memory = noise(mib.parse::<usize>()? << 20);
    let pages = (memory.len() / PAGE).max(1);
    let rate = kib.parse::<f64>()? * 1024.0 / PAGE as f64;
    let (began, mut written, mut last) = (Instant::now(), 0, Instant::now());
    loop {
        // Nobody may be there: on the way to another host there is no route.
        let _ = socket.send_to(b"alive", address);
        // A clock that has stood still, or a processor that was away, is no reason to catch up at once.
        let due = (last.elapsed().min(2 * TICK).as_secs_f64() * rate).round() as usize;
        last = Instant::now();
        for _ in 0..due.min(pages) {
            if let Some(byte) = memory.get_mut(written % pages * PAGE) {
                *byte = byte.wrapping_add(1);
            }
            written += 1;
        }
        black_box(&mut memory);
        let spent = began.elapsed().as_nanos() % TICK.as_nanos();
        thread::sleep(TICK - Duration::from_nanos(u64::try_from(spent)?));
    }
}

/// Memory in which no two pages are alike, and none is empty (Marsaglia's xorshift).
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut memory = Vec::with_capacity(bytes);
    while memory.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memory.extend_from_slice(&state.to_le_bytes());
    }
    memory
}

fn listen(address: &str) -> Result<(), Box<dyn Error>> {
    let socket = UdpSocket::bind(address)?;
    let mut out = io::stdout();
    let (mut last, mut buffer) = (None::<Instant>, [0; 64]);
    for number in 1_u64.. {
        socket.recv(&mut buffer)?;
        let silence = last.replace(Instant::now()).map_or(Duration::ZERO, |last| last.elapsed());
        if silence >= SILENCE {
            writeln!(out, "{}", silence.as_millis())?;
        }
        if number % TOLD == 0 {
            writeln!(out, ".")?;
        }
        out.flush()?;
    }
    Ok(())
}

fn count(file: &str, program: &str, arguments: &[&str]) -> ExitCode {
    let counted = || -> Result<i32, Box<dyn Error>> {
        let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).spawn()?;
        let bytes = relay(&mut io::stdin(), &mut child.stdin.take().ok_or("no pipe")?)?;
        let status = child.wait()?;
        fs::write(file, bytes.to_string())?;
        Ok(status.code().unwrap_or(255))
    };
    match counted() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Err(error) => {
            eprintln!("lab-load: count {program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Copies until there is no more, or no more is taken; how many bytes there were.
fn relay(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<usize> {
    let (mut buffer, mut bytes) = (vec![0; 64 << 10], 0);
    loop {
        let read = from.read(&mut buffer)?;
        // What a program does not take any more it has a reason for, which is its own to say.
        if read == 0 || to.write_all(&buffer[..read]).is_err() {
            return Ok(bytes);
        }
        bytes += read;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_page_is_empty_or_like_another() {
        let memory = noise(64 * PAGE);
        let mut pages: Vec<&[u8]> = memory.chunks(PAGE).collect();
        assert_eq!(pages.len(), 64);
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), 64);
        assert!(!pages.iter().any(|page| page.iter().all(|byte| *byte == 0)));
    }

    #[test]
    fn bytes_are_counted_on_their_way() {
        let (sent, mut arrived) = (noise(300_000), Vec::new());
        assert_eq!(relay(&mut sent.as_slice(), &mut arrived).unwrap(), sent.len());
        assert_eq!(arrived, sent);
    }
}
