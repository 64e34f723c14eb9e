//! Programs as providers have them, at work while their server moves.

use std::fs;

use anyhow::{Context, Result, ensure};
use system_tests::{
    command::eventually,
    lab::{Host, definition::Init, image, pair},
};

use super::{
    ALLOW, Lab,
    pair::{LIMIT, NETWORKS, nothing_at},
};

/// A database under load, somebody who tells it one number after the other, and a program that asks web servers again and again, one in C and
/// one in Go, each on one connection, from three threads' common memory.
const BEGIN: &str = r#"
set -e
cd /root
su postgres -c 'psql -qAt -c "create table told (n bigint primary key)"'
su postgres -c 'pgbench -q -i -s 1 postgres' >/root/init 2>&1
setsid su postgres -c 'pgbench -n -c 2 -T 36000 postgres' >/root/bench 2>&1 </dev/null &
cat >/root/tell <<'TELL'
n=0
while :; do n=$((n + 1)); echo "insert into told values ($n) returning n;"; sleep 0.05; done
TELL
setsid sh -c 'sh /root/tell | su postgres -c "psql -qAt postgres"' >/root/told 2>/root/told-errors </dev/null &
cat >/root/ask.py <<'ASK'
import http.client, os, threading, time
answered, lock = [0, 0, 0], threading.Lock()
def ask(who, port, word):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    socket = connection.sock
    while True:
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert answer.status == 200 and word in answer.read()
        assert connection.sock is socket, "another connection"
        with lock:
            answered[who] += 1
            with open("/root/asked.new", "w") as out:
                print(min(answered), file=out)
            os.rename("/root/asked.new", "/root/asked")
        time.sleep(0.05)
def ask_or_end(who, port, word):
    try:
        ask(who, port, word)
    finally:
        os._exit(1)
for asked in (0, 80, b"nginx"), (1, 80, b"nginx"), (2, 8080, b"in Go"):
    threading.Thread(target=ask_or_end, args=asked).start()
ASK
setsid caddy respond --listen 127.0.0.1:8080 --body "in Go" >/root/caddy-log 2>&1 </dev/null &
for i in $(seq 100); do grep -q 'serving\|Server address' /root/caddy-log && break; sleep 0.5; done
sed -i 's/keepalive_timeout.*/keepalive_timeout 600; keepalive_requests 1000000;/' /etc/nginx/nginx.conf
grep -q keepalive_requests /etc/nginx/nginx.conf || sed -i 's/http {/http { keepalive_timeout 600; keepalive_requests 1000000;/' /etc/nginx/nginx.conf
systemctl restart nginx
setsid python3 /root/ask.py >/root/ask-log 2>&1 </dev/null &
"#;

/// Who they are: those that began stay, whatever happens.
const WHO: &str = "pgrep -x postgres -o; pgrep -x pgbench; pgrep -x nginx; pgrep -x caddy; pgrep -x python3";

/// What has been answered by both.
const FAR: &str = "tail -n 1 /root/told; cat /root/asked";

/// Rows that were told are there without a gap, and the sums of the load agree (pgbench(1): each transaction adds the same to all).
const WHOLE: &str = "select count(*) = max(n) from told; \
    select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history), \
           (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history), \
           (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history)";

/// PostgreSQL, nginx, caddy and a Python program: suspended and resumed, moved there and back, and there once more before its memory.
pub fn a_database_and_a_web_server_go_on(lab: &Lab<'_>) -> Result<()> {
    lab.only_when_there_is_time()?;
    let (definition, image) = lab.found(|definition, _| definition.init == Init::Systemd)?;
    let root = image::workload(&lab.workshop).context("make the guest")?;
    let pair = pair(&lab.workshop, definition, image, lab.payload)?;
    let [a, b] = &pair.hosts;
    for host in [a, b] {
        host.sh(NETWORKS)?;
        host.sh(ALLOW)?;
    }
    a.put("/root/workload.tar", &fs::read(&root).with_context(|| format!("read {}", root.display()))?)?;
    a.sh("vsctl template import workload /root/workload.tar && rm /root/workload.tar")?;
    a.sh("vsctl create web1 --template workload --migratable --memory 800M --ip 10.77.0.9/24 --start")?;
    eventually("its units", LIMIT, || a.sh("vsctl exec web1 -- systemctl is-system-running --wait").ok())
        .with_context(|| a.sh("vsctl exec web1 -- systemctl --failed").unwrap_or_default())?;
    a.put("/tmp/begin", BEGIN.as_bytes())?;
    a.sh("vsctl push web1 /tmp/begin /root/begin && vsctl exec web1 -- sh /root/begin")?;
    goes_further(a)?;
    let began = a.sh(&format!("vsctl exec web1 -- sh -c '{WHO}'"))?;
    let goes_on = |host: &Host| -> Result<()> {
        goes_further(host)?;
        let now = host.sh(&format!("vsctl exec web1 -- sh -c '{WHO}'"))?;
        ensure!(now == began, "these began: {began:?}\nthese are there: {now:?}");
        Ok(())
    };
    a.sh("vsctl suspend web1 && vsctl resume web1")?;
    goes_on(a).context("resumed")?;
    let ways = [(a, b, "b", "--near-live --send-template"), (b, a, "a", "--live"), (a, b, "b", "--live --postcopy")];
    for (from, to, name, how) in ways {
        from.sh(&format!("vsctl migrate web1 {name} {how}")).with_context(|| format!("move it to {name}"))?;
        goes_on(to).with_context(|| format!("at {name}, {how}"))?;
        nothing_at(from)?;
    }
    let at = b;
    let told: u64 = at.sh("vsctl exec web1 -- tail -n 1 /root/told")?.trim().parse()?;
    at.sh("vsctl exec web1 -- sh -c 'pkill pgbench; pkill psql'")?;
    at.put("/tmp/whole", WHOLE.as_bytes())?;
    at.sh("vsctl push web1 /tmp/whole /tmp/whole && vsctl exec web1 -- chmod 644 /tmp/whole")?;
    let whole = at.sh("vsctl exec web1 -- su postgres -c 'psql -qAt -f /tmp/whole'")?;
    ensure!(whole.split_whitespace().eq(["t", "t|t|t"]), "{whole}");
    let rows: u64 =
        at.sh("vsctl exec web1 -- su postgres -c 'psql -qAtc \"select count(*) from told\"'")?.trim().parse()?;
    ensure!(rows >= told, "{told} were told, and {rows} are there");
    Ok(())
}

/// Both say more.
fn goes_further(host: &Host) -> Result<()> {
    let far = || -> Option<Vec<u64>> {
        let text = host.sh(&format!("vsctl exec web1 -- sh -c '{FAR}'")).ok()?;
        let numbers: Vec<u64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
        (numbers.len() == 2).then_some(numbers)
    };
    let seen = || {
        host.sh("vsctl exec web1 -- sh -c 'tail /root/bench /root/told-errors /root/ask-log /root/caddy-log; ps ax'")
            .unwrap_or_default()
    };
    let before = eventually("answers", LIMIT, far).with_context(seen)?;
    eventually("more answers", LIMIT, || far().filter(|now| now.iter().zip(&before).all(|(now, before)| now > before)))
        .with_context(seen)
        .map(drop)
}
