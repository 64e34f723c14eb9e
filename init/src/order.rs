//! The order of services: who comes before whom, and what cannot be ordered.
//!
//! Starting needs no list: each service waits for those before it, so all that can run at once
//! does. What is computed here is whether that waiting ends.

use std::collections::{BTreeMap, BTreeSet};

/// Names of services and of those that each comes after.
pub type Graph = BTreeMap<String, BTreeSet<String>>;

/// All cycles that keep services from ever starting, each as its names in the order
/// "comes after"; the first name is not repeated at the end. Names that are no service are no
/// obstacle here.
pub fn cycles(graph: &Graph) -> Vec<Vec<String>> {
    let mut blocked: BTreeSet<&str> = graph.keys().map(String::as_str).collect();
    let mut found = Vec::new();
    loop {
        take_startable(graph, &mut blocked);
        let Some(first) = blocked.first() else {
            return found;
        };
        let cycle = follow(graph, &blocked, first);
        for name in &cycle {
            blocked.remove(name);
        }
        found.push(cycle.into_iter().map(String::from).collect());
    }
}

/// A cycle for the user: `a → b → a`.
pub fn display(cycle: &[String]) -> String {
    let mut names: Vec<&str> = cycle.iter().map(String::as_str).collect();
    names.extend(cycle.first().map(String::as_str));
    names.join(" → ")
}

/// Removes from `blocked`, again and again, what waits for nothing that is blocked.
fn take_startable<'a>(graph: &'a Graph, blocked: &mut BTreeSet<&'a str>) {
    loop {
        let free: Vec<&str> = blocked.iter().copied().filter(|name| next(graph, blocked, name).is_none()).collect();
        if free.is_empty() {
            return;
        }
        for name in free {
            blocked.remove(name);
        }
    }
}

/// Walks from `start` through blocked services until one comes again.
///
/// Each blocked one waits for another blocked one, so the walk never ends otherwise.
fn follow<'a>(graph: &'a Graph, blocked: &BTreeSet<&'a str>, start: &'a str) -> Vec<&'a str> {
    let mut path = vec![start];
    while let Some(name) = next(graph, blocked, path[path.len() - 1]) {
        if let Some(index) = path.iter().position(|seen| *seen == name) {
            return path.split_off(index);
        }
        path.push(name);
    }
    path
}

/// The first blocked service that `name` comes after.
fn next<'a>(graph: &'a Graph, blocked: &BTreeSet<&'a str>, name: &str) -> Option<&'a str> {
    graph[name].iter().map(String::as_str).find(|before| blocked.contains(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `"a: b c; b:"` = a comes after b and c, b after nothing.
    fn graph(text: &str) -> Graph {
        let entry = |part: &str| {
            let (name, before) = part.split_once(':').unwrap();
            let before = before.split_whitespace().map(String::from).collect();
            (name.trim().to_string(), before)
        };
        text.split(';').map(entry).collect()
    }

    fn check(text: &str, expected: &[&str]) {
        let found: Vec<String> = cycles(&graph(text)).iter().map(|c| display(c)).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn what_can_be_ordered_has_no_cycle() {
        check("a:", &[]);
        check("a: b c; b: c; c:", &[]);
        check("a: unknown", &[]);
    }

    #[test]
    fn cycles_are_found_and_named() {
        check("a: a", &["a → a"]);
        check("a: b; b: a", &["a → b → a"]);
        check("a: b; b: c; c: a; d: a; e:", &["a → b → c → a"]);
        check("x: a; a: b; b: a", &["a → b → a"]);
        check("a: b; b: a; c: d; d: c", &["a → b → a", "c → d → c"]);
    }

    #[test]
    fn cycles_that_share_a_service_are_one_find() {
        check("a: b; b: a c; c: b", &["a → b → a"]);
    }

    proptest::proptest! {
        /// Without the cycles that were found, everything can be ordered.
        #[test]
        fn taking_the_cycles_out_leaves_none(edges in proptest::collection::vec((0u8..12, 0u8..12), 0..40)) {
            let mut graph: Graph = (0..12).map(|n| (n.to_string(), BTreeSet::new())).collect();
            for (from, to) in edges {
                graph.get_mut(&from.to_string()).unwrap().insert(to.to_string());
            }
            let found = cycles(&graph);
            for cycle in &found {
                for pair in cycle.windows(2) {
                    proptest::prop_assert!(graph[&pair[0]].contains(&pair[1]));
                }
                proptest::prop_assert!(graph[&cycle[cycle.len() - 1]].contains(&cycle[0]));
            }
            for name in found.iter().flatten() {
                graph.remove(name);
            }
            proptest::prop_assert!(cycles(&graph).is_empty());
        }
    }
}
