//! The pause before a service is started again.

use std::time::Duration;

use crate::service::ServiceFile;

/// The pause after a run of `ran`, when the pause before that run was `previous`.
pub fn delay(file: &ServiceFile, previous: Option<Duration>, ran: Duration) -> Duration {
    let first = Duration::from_millis(file.restart_delay_ms);
    let longest = Duration::from_millis(file.restart_delay_max_ms);
    match previous {
        Some(previous) if ran < Duration::from_millis(file.stable_ms) => {
            // A first pause of 0 must grow too, or a crash loop would eat a processor.
            (previous.max(Duration::from_millis(1)) * 2).min(longest)
        }
        _ => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_the_longest_and_starts_over_after_a_stable_run() {
        let file = ServiceFile::parse("x", "exec='a'\nrestart_delay_max_ms=1000").unwrap();
        let short = Duration::from_millis(5);
        let mut pauses = vec![delay(&file, None, short)];
        for _ in 0..5 {
            pauses.push(delay(&file, pauses.last().copied(), short));
        }
        let millis: Vec<u128> = pauses.iter().map(Duration::as_millis).collect();
        assert_eq!(millis, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(delay(&file, pauses.last().copied(), Duration::from_secs(10)).as_millis(), 100);
    }

    #[test]
    fn a_first_pause_of_zero_still_grows() {
        let file = ServiceFile::parse("x", "exec='a'\nrestart_delay_ms=0").unwrap();
        let none = delay(&file, None, Duration::ZERO);
        assert_eq!(none, Duration::ZERO);
        assert_eq!(delay(&file, Some(none), Duration::ZERO).as_millis(), 2);
    }
}
