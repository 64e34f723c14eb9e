//! `/proc/cpuinfo`: the host's description of as many CPUs as the server sees, numbered from 0.

use super::put_number;
use crate::snapshot::{CpuBlock, Cpus};

/// Renders cpuinfo from the host's blocks. The model, speed and flags are those of real CPUs of the server's set;
/// their place in sockets and cores is that of one socket with as many cores as the server sees CPUs, so that
/// programs that count cores, threads or sockets all count the same.
pub fn cpuinfo(out: &mut String, host: &[CpuBlock], cpus: &Cpus) {
    let mut next = 0;
    for block in host {
        match block.number {
            Some(number) if next < cpus.visible && cpus.set.contains(&number) => {
                put_block(out, block, next, cpus.visible);
                next += 1;
            }
            Some(_) => {}
            None => {
                block.lines.iter().for_each(|(_, line)| out.extend([line, "\n"]));
                out.push('\n');
            }
        }
    }
}

fn put_block(out: &mut String, block: &CpuBlock, index: usize, count: usize) {
    for (key, line) in &block.lines {
        let number = match key.trim_end() {
            "processor" | "core id" | "apicid" | "initial apicid" => index,
            "siblings" | "cpu cores" => count,
            "physical id" => 0,
            _ => {
                out.push_str(line);
                out.push('\n');
                continue;
            }
        };
        out.extend([key, ": "]);
        put_number(out, number as u64, 0);
        out.push('\n');
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::parse;

    const HOST: &str = "processor\t: 0\nmodel\t\t: 1\nsiblings\t: 3\ncore id\t\t: 0\ncpu cores\t: 3\npower management:\n\n\
                        processor\t: 1\nmodel\t\t: 2\nsiblings\t: 3\ncore id\t\t: 1\ncpu cores\t: 3\npower management:\n\n\
                        processor\t: 2\nmodel\t\t: 3\nsiblings\t: 3\ncore id\t\t: 2\ncpu cores\t: 3\npower management:\n\n";

    #[test]
    fn the_set_is_renumbered_and_cut_to_the_quota() {
        let mut out = String::new();
        cpuinfo(&mut out, &parse::cpuinfo(HOST), &Cpus { set: vec![1, 2], visible: 1 });
        let wanted =
            "processor\t: 0\nmodel\t\t: 2\nsiblings\t: 1\ncore id\t\t: 0\ncpu cores\t: 1\npower management:\n\n";
        assert_eq!(out, wanted);
    }

    #[test]
    fn all_cpus_of_an_unlimited_server_read_as_on_the_host() {
        let mut out = String::new();
        cpuinfo(&mut out, &parse::cpuinfo(HOST), &Cpus { set: vec![0, 1, 2], visible: 3 });
        assert_eq!(out, HOST);
    }
}
