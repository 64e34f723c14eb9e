//! `/proc/cpuinfo`: the host's description of as many CPUs as the server sees, numbered from 0.

use super::put;
use crate::snapshot::Cpus;

/// Renders cpuinfo from the host's text. The model, speed and flags are those of real CPUs of the server's set;
/// their place in sockets and cores is that of one socket with as many cores as the server sees CPUs, so that
/// programs that count cores, threads or sockets all count the same.
pub fn cpuinfo(out: &mut String, host: &str, cpus: &Cpus) {
    let mut next = 0;
    for block in host.split_terminator("\n\n") {
        match processor(block) {
            Some(number) if next < cpus.visible && cpus.set.contains(&number) => {
                put_block(out, block, next, cpus.visible);
                next += 1;
            }
            Some(_) => {}
            // A block about the machine as a whole (arm).
            None if !block.trim().is_empty() => put!(out, "{}\n\n", block.trim_end_matches('\n')),
            None => {}
        }
    }
}

/// The number of the CPU that a block describes.
fn processor(block: &str) -> Option<u32> {
    let (key, value) = block.trim_start_matches('\n').lines().next()?.split_once(':')?;
    (key.trim_end() == "processor").then(|| value.trim().parse().ok())?
}

fn put_block(out: &mut String, block: &str, index: usize, count: usize) {
    for line in block.trim_matches('\n').lines() {
        let Some((key, _)) = line.split_once(':') else {
            out.extend([line, "\n"]);
            continue;
        };
        match key.trim_end() {
            "processor" | "core id" | "apicid" | "initial apicid" => put!(out, "{key}: {index}\n"),
            "siblings" | "cpu cores" => put!(out, "{key}: {count}\n"),
            "physical id" => put!(out, "{key}: 0\n"),
            _ => out.extend([line, "\n"]),
        }
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "processor\t: 0\nmodel\t\t: 1\nsiblings\t: 3\ncore id\t\t: 0\ncpu cores\t: 3\npower management:\n\n\
                        processor\t: 1\nmodel\t\t: 2\nsiblings\t: 3\ncore id\t\t: 1\ncpu cores\t: 3\npower management:\n\n\
                        processor\t: 2\nmodel\t\t: 3\nsiblings\t: 3\ncore id\t\t: 2\ncpu cores\t: 3\npower management:\n\n";

    #[test]
    fn the_set_is_renumbered_and_cut_to_the_quota() {
        let mut out = String::new();
        cpuinfo(&mut out, HOST, &Cpus { set: vec![1, 2], visible: 1 });
        let wanted =
            "processor\t: 0\nmodel\t\t: 2\nsiblings\t: 1\ncore id\t\t: 0\ncpu cores\t: 1\npower management:\n\n";
        assert_eq!(out, wanted);
    }

    #[test]
    fn all_cpus_of_an_unlimited_server_read_as_on_the_host() {
        let mut out = String::new();
        cpuinfo(&mut out, HOST, &Cpus { set: vec![0, 1, 2], visible: 3 });
        assert_eq!(out, HOST);
    }
}
