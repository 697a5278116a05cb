"""What a run writes: lines that survive a restart, and a clock that adds up."""

import io
import json
import math
import time

import jax
import jax.numpy as jnp
from tensorboardX.proto.event_pb2 import Event

from stagecraft import metrics


def test_a_restart_leaves_each_step_once(tmp_path):
    first = metrics.Writer(tmp_path)
    for step in range(1, 6):
        first.write(step, float(step), {"loss": 1.0 / step})
        first.write_samples(step, [{"prompt": "a", "completion": "ü"}])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process died here
    again = metrics.Writer(tmp_path, resume_step=3)
    again.write(4, 4.0, {"loss": 9.0, "bad": float("nan")})
    again.write_samples(4, [{"prompt": "a", "completion": "b", "score": math.inf}])
    again.close()
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == 9.0 and rows[-1]["bad"] is None
    assert len(metrics.read(tmp_path / "samples.jsonl")) == 4
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda name: 1 / 0)  # no NaN in JSON


def test_the_same_numbers_are_tensorboard_events(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(7, 0.0, {"loss": 0.5})
    writer.close()
    [path] = tmp_path.glob("events.*")
    data, found = path.read_bytes(), {}
    while data:  # TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    assert found == {("loss", 7): 0.5}


def test_the_clock_splits_compiling_and_nested_sections():
    clock, start = metrics.Clock(), time.perf_counter()
    with clock("outer"):
        time.sleep(0.02)
        with metrics.section("inner"):
            time.sleep(0.03)
            jax.jit(lambda x: jnp.sin(x) * 3.0)(1.0).block_until_ready()
    assert clock.seconds["compile"] > 0
    assert clock.seconds["inner"] >= 0.03 and clock.seconds["outer"] >= 0.02
    # Nothing is counted twice: the parts are no more than what has passed.
    assert clock.total() <= time.perf_counter() - start


def test_progress_prints_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = metrics.Progress("sft", 4, log=2, stream=stream)
    progress.note("compiling")
    for step in range(1, 5):
        progress.step(step, {"loss": 1.0 / step}, tokens=100)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert "compiling" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["2/4", "4/4"]
    assert "loss 0.25" in lines[-1] and "tokens/s" in lines[-1]


def test_progress_of_rewards_says_whether_any_group_teaches():
    stream = io.StringIO()
    progress = metrics.Progress("grpo", 1, log=1, stream=stream)
    values = {"loss": 0.0, "reward": 0.25, "frac_reward_zero_std": 1.0}
    progress.step(1, values | {"completions/mean_length": 48.0, "other": 3.0})
    line = stream.getvalue()
    assert "reward 0.25  frac_reward_zero_std 1  mean_length 48" in line
    assert "other" not in line


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = metrics.Progress("filter", 3, log=3, stream=stream)
    for step in range(1, 4):
        progress.step(step)
    progress.close()
    assert "filter" in stream.getvalue() and "3/3" in stream.getvalue()
    assert "\x1b" in stream.getvalue()
