//! `/proc/loadavg`: averages of the server's own tasks, how many run, how many there are.

use super::put;
use crate::load::Tasks;

/// Renders loadavg from averages in hundredths.
///
/// The last field, the newest pid, is 0: the numbers of the server's own pid namespace cannot be seen from
/// outside without opening a file of every process, and a pid of the host is none of its business.
pub fn loadavg(out: &mut String, hundredths: [u64; 3], tasks: Tasks, count: u64) {
    for average in hundredths {
        put!(out, "{}.{:02} ", average / 100, average % 100);
    }
    // Whoever reads this runs, and is one of the tasks.
    let running = tasks.running.max(1);
    put!(out, "{running}/{} 0\n", count.max(running));
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_reader_counts_as_running() {
        let mut out = String::new();
        super::loadavg(&mut out, [105, 40, 0], Default::default(), 0);
        assert_eq!(out, "1.05 0.40 0.00 1/1 0\n");
    }
}
