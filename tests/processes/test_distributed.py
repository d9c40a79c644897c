"""Several processes of one run: where each learns its place, what they say to one another, and how they end."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_processes import ROOT, run

from medcg_jax import processes
from medcg_jax.cluster import AUTO, FLAGS, NAMES, Cluster, detect, first_host, tasks_of
from medcg_jax.config import ConfigError

quick = settings(max_examples=100, deadline=None)
hosts = st.from_regex("[a-z][a-z0-9-]{0,8}[0-9]{1,3}", fullmatch=True)

# ------------------------------------------------------------------ what the environment says


def step(count: int, index: int, **more: str) -> dict[str, str]:
    """The environment of a task that srun started."""
    return {
        "SLURM_JOB_ID": "5000", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_PROCID": str(index), "SLURM_LOCALID": "0",
    } | more  # fmt: skip


@quick
@given(host=hosts, port=st.integers(1, 65535), count=st.integers(2, 999), data=st.data())
def test_flags_win_and_say_the_whole_place(host, port, count, data):
    index = data.draw(st.integers(0, count - 1))
    given_flags = dict(coordinator=f"{host}:{port}", num_processes=str(count), process_id=str(index))
    found = detect(step(4, 2) | {NAMES[0]: "other:1"}, **given_flags)
    assert found == Cluster("flags", f"{host}:{port}", count, index)
    named = dict(zip(NAMES, given_flags.values(), strict=True))
    assert detect(step(4, 2) | named) == Cluster("the environment", f"{host}:{port}", count, index)
    del named[NAMES[2]]
    assert detect(named | {"JOB_COMPLETION_INDEX": str(index)}) == Cluster("GKE", f"{host}:{port}", count, index)


@quick
@given(given_flags=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(lambda f: any(f) and not all(f)))
def test_some_of_the_flags_are_refused_with_the_missing_ones(given_flags):
    values = [value if has else "" for value, has in zip(("node1:99", "4", "2"), given_flags, strict=True)]
    with pytest.raises(ConfigError) as refused:
        detect({}, coordinator=values[0], num_processes=values[1], process_id=values[2])
    said = str(refused.value)
    assert "\n" not in said
    for flag, has in zip(FLAGS, given_flags, strict=True):
        assert (flag in said.partition(" without ")[2]) == (not has)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("node1", "2", "0"), "--coordinator=node1: expected HOST:PORT"),
        (("node1:0", "2", "0"), "--coordinator=node1:0: expected a port"),
        (("node1:70000", "2", "0"), "--coordinator=node1:70000: expected a port"),
        (("node1:9", "none", "0"), "--num_processes=none"),
        (("node1:9", "0", "0"), "--num_processes=0"),
        (("node1:9", "2", "2"), "--process_id=2: expected 0 to 1"),
        (("node1:9", "2", "-1"), "--process_id=-1: expected 0 to 1"),
        (("auto", "2", "0"), "--coordinator=auto: expected HOST:PORT"),
    ],
)
def test_flags_that_are_no_use_are_named(values, said):
    with pytest.raises(ConfigError, match=said):
        detect({}, coordinator=values[0], num_processes=values[1], process_id=values[2])


def test_what_is_a_run_of_its_own():
    assert detect({}) is None
    assert detect(step(1, 0)) is None
    # Tasks of an array and pods of an indexed Job share a grid by claims.
    assert detect(step(1, 0, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="8", SLURM_NTASKS="1")) is None
    assert detect({"JOB_COMPLETION_INDEX": "3"}) is None
    # A batch script that has asked for several tasks and is not started by srun.
    assert detect({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    assert detect({"TPU_WORKER_HOSTNAMES": "t1v-n-0", "TPU_WORKER_ID": "0"}) is None
    assert detect(step(4, 1), num_processes="1") is None


def test_what_starts_several():
    found = detect(step(4, 3))
    assert found == Cluster("SLURM", "gpu07:66441".replace("66441", str(61440 + 5001 % 4096)), 4, 3)
    assert detect(step(4, 3, JAX_COORDINATOR_PORT="9")).coordinator == "gpu07:9"
    assert detect(step(4, 3, JAX_COORDINATOR_ADDRESS="login:77")).coordinator == "login:77"
    assert detect({}, coordinator="auto") == Cluster("JAX", AUTO)
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}).coordinator == AUTO


@pytest.mark.parametrize(
    ("tasks", "visible", "own"), [("8(x2)", "0,1,2,3,4,5,6,7", (5,)), ("1(x2)", "0,1,2,3", None), ("8(x2)", "3", None)]
)
def test_a_slurm_task_takes_one_gpu_only_where_each_has_one(tasks, visible, own):
    more = {"SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": visible}
    more |= {"SLURM_LOCALID": "5", "SLURM_NODEID": "1"}
    assert detect(step(16, 13, **more)).local_devices == own


@quick
@given(names=st.lists(hosts, min_size=1, max_size=4))
def test_the_first_host_of_a_plain_list(names):
    assert first_host(",".join(names)) == names[0]


@quick
@given(
    head=st.from_regex("[a-z]{1,6}-?", fullmatch=True), first=st.integers(0, 999), width=st.integers(1, 4),
    rest=st.text("-,0123456789", max_size=6), tail=st.sampled_from(("", "-ib", ",other[1-4]")),
)  # fmt: skip
def test_the_first_host_of_a_short_form(head, first, width, rest, tail):
    number = f"{first:0{width}d}"
    more = f",{rest.strip('-,')}" if rest.strip(string.punctuation) else ""
    assert first_host(f"{head}[{number}{more}]{tail}") == head + number + tail.partition(",")[0]


@quick
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), data=st.data())
def test_the_tasks_of_a_node(counts, data):
    short, i = [], 0
    while i < len(counts):
        times = 1
        while i + times < len(counts) and counts[i + times] == counts[i]:
            times += 1
        short.append(f"{counts[i]}(x{times})" if times > 1 else f"{counts[i]}")
        i += times
    node = data.draw(st.integers(0, len(counts) - 1))
    assert tasks_of(",".join(short), node) == counts[node]


# ------------------------------------------------------------------ who is dead


@quick
@given(
    last=st.dictionaries(st.integers(0, 9), st.integers(0, 200), min_size=1), ends_at=st.integers(1, 200),
    every=st.integers(1, 5),
)  # fmt: skip
def test_dead_is_who_has_been_silent_for_long(last, ends_at, every):
    """Each process beats once a second until its own last one; process 0 looks every so many seconds."""
    seen, found, at = {}, {}, 0
    for at in range(0, ends_at + 1, every):
        beats = {index: str(min(at, stop)) for index, stop in last.items()}
        found = processes.silent(seen, beats, float(at))
    for index, stop in last.items():
        silent_s = at - stop
        if silent_s > processes.DEAD_AFTER_S + every:
            assert index in found
        if silent_s <= processes.DEAD_AFTER_S:
            assert index not in found


def test_without_other_processes_nothing_is_waited_for():
    processes.barrier("nothing")
    assert processes.broadcast("a number", lambda: 3) == 3
    assert processes.is_first() and processes.count() == 1 and processes.whoami() == ""
    processes.fail(2, "not ended by this")
    processes.finish()


# ------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def together():
    found = run("processes/together.py", processes=2, devices=2)
    assert [one.status for one in found] == [0, 0], found[0].err[-2000:] + found[1].err[-2000:]
    said = [json.loads(one.out.rpartition("SAID ")[2].splitlines()[0]) for one in found]
    return found, said


def test_they_know_one_another(together):
    found, said = together
    assert [one["first"] for one in said] == [True, False]
    for index, (ended, one) in enumerate(zip(found, said, strict=True)):
        assert one["name"].startswith(f"process {index} (")
        assert f"medcg: {one['name']} of 2 by the test, coordinator 127.0.0.1:" in ended.err


def test_a_barrier_says_for_whom_it_waits(together):
    found, said = together
    assert f"medcg: a meeting: waiting for {said[1]['name']} since " in found[0].err
    assert "a meeting: waiting for" not in found[1].err
    assert said[0]["missed"] == f"a meeting: {said[1]['name']} did not come within 1 s"


def test_all_hear_what_the_first_one_says(together):
    assert [one["heard"] for one in together[1]] == [[[7, 0], [7, 1], [7, 2]]] * 2


def test_every_device_has_the_rows_that_the_mesh_gives_it(together):
    _, said = together
    for one in said:
        assert all(found["right"] for found in one["rows"].values()), one["rows"]
    # Rows of a process that do not follow one another; parts that two processes share; all of it on both.
    parts = [{name: found["parts"] for name, found in one["rows"].items()} for one in said]
    assert [one["(4, 1, 1) crossed"] for one in parts] == [[0, 2], [1, 3]]
    assert [one["(2, 1, 2) in order"] for one in parts] == [[0], [1]]
    assert [one["(2, 1, 2) crossed"] for one in parts] == [[0, 1], [0, 1]]
    assert [one["(1, 1, 4) in order"] for one in parts] == [[0], [0]]


def test_evaluation_ends_with_an_uneven_last_batch_and_with_fewer_records_than_processes(together, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "eval"))
    from eval_toys import TOKENIZER, encoded, model_on, records

    from medcg_jax.eval.letters import evaluate

    evaluator, _, params = model_on()
    for size in (7, 1):
        alone = evaluate(evaluator, params, encoded(records(size)), TOKENIZER, batch_size=4)
        for one in together[1]:
            found = one["scores"][str(size)]
            assert [[p.id, p.predicted, p.generated] for p in alone] == [[a, b, d] for a, b, _, d in found]
            for p, (_, _, logprobs, _) in zip(alone, found, strict=True):
                assert max(abs(a - b) for a, b in zip(p.logprobs, logprobs, strict=True)) < 2e-4


@pytest.mark.parametrize(("victim", "way"), [(1, "killed"), (0, "killed"), (2, "raises")])
def test_one_that_ends_early_ends_the_others_with_its_name(victim, way):
    found = run("processes/dies.py", str(victim), way, processes=3, devices=1, timeout_s=90)
    for index, one in enumerate(found):
        if index != victim:
            assert one.status not in (0, None), one
            said = [line for line in one.err.splitlines() if line.startswith("medcg: process")]
            [named] = [line for line in said if " of 3 by" not in line]
            assert named.startswith(f"medcg: process {victim} ("), named
            assert ("/nowhere: it is not on this host" in named) == (way == "raises")
    assert found[victim].status == (2 if way == "raises" else -9)
