"""What processes have in common, as far as one process can tell."""

import io
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from stagecraft import native_lines, processes, sharding
from stagecraft.errors import UserError

LOST = b"""\
E1130 03:00:32.375335   10130 coordination_service_agent.cc:289] Polled an error.
F1130 03:00:32.375449   10130 client.h:80] Terminating process because the JAX \
distributed service detected fatal errors. UNAVAILABLE: The following tasks are \
unhealthy (stopped sending heartbeats):
3
5
The tasks have crashed. Check the task logs for an earlier error.

*** Check failure stack trace: ***
    @     0x7fb8e5040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LEADER = b"""\
F1130 03:00:37.335420   10227 client.h:80] Terminating process because the JAX \
distributed service detected fatal errors. UNAVAILABLE: Failed to send RPC to \
coordination service. Either the leader task was preempted or died.
"""


def through(data):
    out = io.BytesIO()
    native_lines.main(io.BytesIO(data), out)
    return out.getvalue().decode()


def test_the_trace_of_a_lost_process_becomes_a_line():
    line = through(b"before\n" + LOST)
    assert line.startswith("before\nstagecraft: processes 3, 5 of this run is gone")
    assert line.count("\n") == 2
    assert through(LEADER).startswith("stagecraft: process 0 of this run is gone")


def test_other_crashes_are_left_as_they_are():
    trace = b"F1130 03:00:37.33 10227 buffer.cc:80] Check failed: size > 0\n  @ 0x7f\n"
    assert through(trace) == trace.decode()
    service = b"E1130 03:00 1 coordination_service.cc:1549] Something else.\n"
    assert through(service + trace) == (service + trace).decode()
    assert through(b"[Gloo] Rank 1 is connected to 1 peer ranks.\n") == ""


def test_what_native_code_writes_goes_through_the_filter():
    script = (
        "import os, sys; from stagecraft import native_lines; native_lines.divert();"
        "print('out'); print('err', file=sys.stderr);"
        "os.write(2, b'[Gloo] Rank 1 is connected to 1 peer ranks.\\n');"
        "os.write(1, b'kept\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.stdout == b"out\n"
    assert sorted(done.stderr.splitlines()) == [b"err", b"kept"]


@pytest.mark.parametrize(
    "given, said",
    [
        (("127.0.0.1:1", None, 2), "go together"),
        (("", 0, 2), "go together"),
        (("127.0.0.1", 0, 2), "--coordinator=127.0.0.1: expected HOST:PORT"),
        (("127.0.0.1:1", 2, 2), "--process=2 --processes=2: .* from 0 to 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        processes.start(*given)


def test_a_coordinator_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr(processes, "CONNECTING", 0.5)
    said = r"process 1 of 2 cannot reach process 0 at 127.0.0.1:9 \(.+\) for 0.5 s"
    with pytest.raises(UserError, match=said):
        processes._reach("127.0.0.1:9", 1, 2)


def test_clusters_are_seen_where_they_are(monkeypatch):
    assert processes._cluster() is None
    slurm = dict(JOB_ID="77", STEP_NODELIST="n[3-5]", NTASKS="3", PROCID="2")
    for name, value in (slurm | dict(LOCALID="0")).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, index, count = processes._cluster()
    assert (address.partition(":")[0], index, count) == ("n3", 2, 3)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes._cluster() is None


def test_a_program_of_one_process_waits_for_nobody():
    assert processes.here() == (0, 1) and not processes.several()
    assert processes.in_turn(lambda: 3, "work") == 3
    assert processes.of_first({"a": 1}) == {"a": 1}
    processes.barrier("a")
    processes.check_same("config", {"a": 1})
    processes.fail("a", 2)
    processes.finish()


def pace(seconds, elapsed, monkeypatch):
    """A `Pace` in its seventh step, which has taken so long."""
    one, now = processes.Pace("sft"), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for step, took in enumerate(seconds, 1):
        with one(step):
            now[0] += took
    one.open = one(7)  # which a `with` would close
    one.open.__enter__()
    one.ready()
    now[0] += elapsed
    return one


def test_who_is_behind_is_named_once(monkeypatch, caplog):
    one = pace([1.0] * 6, 3.5, monkeypatch)
    monkeypatch.setattr(processes._log, "propagate", True)
    seen = {0: ((7, 1), 0.1), 1: ((7, 0), 0.2), 2: ((7, 1), 9.0), 3: ((7, 1), 0.1)}
    one.look(seen)
    one.look(seen)
    assert [record.getMessage() for record in caplog.records] == [
        "sft: step 7 takes 3.5 s so far, more than 3 x the median of 1 s; it waits for "
        "process 1 (at step 7), process 2 (at step 7, not heard of for 9 s)"
    ]


@pytest.mark.parametrize(
    "seconds, elapsed", [([1.0] * 6, 2.9), ([1.0] * 3, 9.0), ([0.1] * 6, 1.9)]
)
def test_a_step_like_the_others_is_not_late(monkeypatch, seconds, elapsed):
    assert pace(seconds, elapsed, monkeypatch).late() is None


def test_a_process_alone_holds_all_rows():
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
        assert sharding.own_rows(16, sharding.make_mesh(*sizes)) is None


def test_arrays_come_to_the_host_in_order():
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    placed = sharding.shard_batch({"a": rows}, sharding.make_mesh(4, 2, 1))
    assert np.array_equal(sharding.to_host(placed)["a"], rows)
    part = np.array([np.nan, np.inf, 0.1])
    assert sharding.joined(part, [3]) is part


def test_the_largest_vote_counts_a_step_later():
    vote = sharding.Vote()
    assert vote.count() == 0
    vote.cast(31)
    assert vote.count() == 31 and len(jax.devices()) == 8
