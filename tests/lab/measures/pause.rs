//! For how long a server is silent while it is kept or moved, as a listener on the network hears it.

use anyhow::Result;
use system_tests::{lab::pair::Pair, sample::Sample};

use super::{ground::silence, timed::timed};

/// How a server is moved.
const WAYS: [&str; 4] = ["--near-live", "--live", "--near-live --postcopy", "--live --postcopy"];

/// What came of one server.
#[derive(Default)]
pub struct Pause {
    /// The longest silence while nothing is done: how busy the machine is with other things.
    pub quiet: Sample,
    /// Silence in `checkpoint create --leave-running`.
    pub kept: Sample,
    /// … in each of [`WAYS`], and how long the command took.
    pub moved: [Sample; WAYS.len()],
    pub took: [Sample; WAYS.len()],
}

/// Measures the server `web1`, which is at the first host, and is there again afterwards. Of each way of moving both directions have
/// their turns.
///
/// # Errors
/// What a command says.
pub fn measure(pair: &Pair, rounds: usize) -> Result<Pause> {
    let [a, b] = &pair.hosts;
    let mut pause = Pause::default();
    for round in 0..rounds {
        pause.quiet.add(silence(a, || timed(a, "sleep 10"))?.1);
        pause.kept.add(silence(a, || timed(a, "vsctl checkpoint create web1 kept --leave-running"))?.1);
        a.sh("vsctl checkpoint delete web1 kept")?;
        for turn in 0..WAYS.len() {
            let way = (turn + round) % WAYS.len();
            let (host, other) = if turn % 2 == 0 { (a, "b") } else { (b, "a") };
            let (took, silent) = silence(a, || timed(host, &format!("vsctl migrate web1 {other} {}", WAYS[way])))?;
            eprintln!("lab: {}: silent for {:.2} s of {:.2} s", WAYS[way], silent.as_secs_f64(), took.as_secs_f64());
            pause.moved[way].add(silent);
            pause.took[way].add(took);
        }
    }
    Ok(pause)
}
