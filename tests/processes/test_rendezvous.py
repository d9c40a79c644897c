"""How the processes of a run meet before JAX starts, with threads in place of processes; and what they must share."""

import json
import socket
import threading
import time

import pytest
from in_processes import free_port

from medcg_jax import agreement, cli, processes, rendezvous
from medcg_jax.cluster import Cluster
from medcg_jax.config import ConfigError, RunConfig, RunError, replace


def meet(*places: tuple[int, int], port: int = 0, timeout_s: float = 10.0) -> tuple[list, list[str]]:
    """(what the processes with these numbers and counts end with, lines that they say), of one start."""
    coordinator, said, ends = f"127.0.0.1:{port or free_port()}", [], [None] * len(places)

    def start(place: int, index: int, count: int):
        try:
            with rendezvous.rendezvous(
                Cluster("the test", coordinator, count, index), timeout_s, said.append
            ) as address:
                ends[place] = address
        except (ConfigError, RunError) as error:
            ends[place] = error

    threads = [threading.Thread(target=start, args=(place, *of)) for place, of in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return ends, said


def test_all_come_in_any_order_and_the_port_is_free_again():
    port = free_port()
    for _ in range(2):
        assert meet((2, 3), (0, 3), (1, 3), port=port)[0] == [None, f"127.0.0.1:{port}", None]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (((0, 3), (1, 3), (1, 3)), "process 1 is there twice"),
        (((0, 2), (1, 3)), "num_processes=3 on process 1"),
        (((0, 3), (1, 2)), "num_processes=2 on process 1"),
        (((0, 3), (1, 3), (4, 5)), "num_processes=5 on process 4"),
    ],
)
def test_processes_that_do_not_fit_all_end_with_the_same_line(places, said, monkeypatch):
    monkeypatch.setattr(rendezvous, "LATE_S", 1.0)
    ends, _ = meet(*places)
    assert all(isinstance(end, ConfigError) for end in ends)
    [line] = set(map(str, ends))
    assert said in line and socket.gethostname() in line and "\n" not in line


def test_one_that_is_missing_is_named_on_all(monkeypatch):
    monkeypatch.setattr(rendezvous, "REPORT_AFTER_S", 0.2)
    ends, said = meet((0, 3), (2, 3), timeout_s=2.0)
    assert [type(end) for end in ends] == [RunError, RunError]
    assert all("process 1 did not come within 2 s" in str(end) for end in ends)
    assert any("waiting for process 1" in line for line in said)


def test_without_process_0_the_time_is_over_for_the_others():
    [end], _ = meet((1, 2), timeout_s=1.0)
    assert isinstance(end, RunError) and "process 0 did not come" in str(end)


def test_a_port_that_another_has_is_refused(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        [end], _ = meet((0, 2), port=port)
        assert isinstance(end, ConfigError)
        assert f"process 0 cannot listen at 127.0.0.1, port {port}" in str(end)
        # As a run that has begun does: it answers, and waits for nobody.
        monkeypatch.setattr(rendezvous, "OTHERS_S", 0.5)

        def answer():
            while True:
                try:
                    connection = other.accept()[0]
                except OSError:
                    return
                connection.sendall(b"\0\0\x12\x04\0")
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        [end], _ = meet((1, 2), port=port)
        assert isinstance(end, ConfigError) and "a complete run" in str(end)


def test_strangers_at_the_port_are_passed_over():
    port, ends = free_port(), []
    run = threading.Thread(target=lambda: ends.append(meet((0, 2), (1, 2), port=port)[0]))
    with rendezvous.listen(f"127.0.0.1:{port}")[0] as listener:
        texts = [
            b"GET / HTTP/1.1\n",
            b"{}\n",
            b"[" * 9000 + b"\n",
            b'{"process": -1, "count": 2, "host": ""}\n',
            b"",
            b"\xff\n",
        ]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in texts]
        cluster = Cluster("the test", f"127.0.0.1:{port}", 2, 0)
        waits = threading.Thread(target=lambda: rendezvous._host(listener, cluster, 10.0, print))
        waits.start()
        for stranger, text in zip(strangers, texts, strict=True):
            stranger.sendall(text)
        time.sleep(0.3)
        assert waits.is_alive()
        rendezvous._join(Cluster("the test", f"127.0.0.1:{port}", 2, 1), 10.0, print)
        waits.join(10)
        assert not waits.is_alive()
        for stranger in strangers:
            stranger.close()
    run.start()
    run.join(20)
    assert ends == [[f"127.0.0.1:{port}", None]]


@pytest.mark.parametrize(
    ("host", "addresses", "listens"),
    [
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("localhost", ["127.0.0.1"], "127.0.0.1"),
        ("node1", ["127.0.0.3"], "[::]"),  # its own name for itself: others find it elsewhere
        ("node1", ["192.0.2.1"], None),  # an address of no host
        ("192.0.2.1", ["192.0.2.1"], None),
    ],
)
def test_process_0_listens_at_the_address_that_is_given_alone(monkeypatch, host, addresses, listens):
    port = free_port()
    kind = socket.AF_INET
    monkeypatch.setattr(rendezvous, "_resolved", lambda address: [(kind, 1, 6, "", (ip, port)) for ip in addresses])
    if listens is None:
        with pytest.raises(ConfigError, match="is no address of"):
            rendezvous.listen(f"{host}:{port}")
        return
    listener, address = rendezvous.listen(f"{host}:{port}")
    with listener:
        assert address in (f"{listens}:{port}", f"0.0.0.0:{port}" if listens == "[::]" else "")


def test_a_name_that_gets_its_address_late_is_waited_for(monkeypatch):
    looks, port = [], free_port()

    def lookup(address):
        looks.append(address)
        if len(looks) < 3:
            raise rendezvous._NotHereError("node0 has no address here")
        return [(socket.AF_INET, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(rendezvous, "_resolved", lookup)
    monkeypatch.setattr(rendezvous, "POLL_S", 0.01)
    rendezvous._listen_soon(f"node0:{port}", 5.0)[0].close()
    assert len(looks) == 3
    looks.clear()
    with pytest.raises(ConfigError, match="no address"):
        rendezvous._listen_soon(f"node0:{port}", 0.0)


# ------------------------------------------------------------------ what they share

RUN = RunConfig()


def facts(run: RunConfig, **more) -> dict:
    return agreement.facts_of(run, "train", cli.Path("/w"), {"all": "ab"}) | more


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            facts(replace(RUN, train__learning_rate=5e-5)),
            "config.train.learning_rate is 5e-05 on process 1 (b) and 5e-06",
        ),
        (facts(replace(RUN, data__seed=7)), "config.data.seed is 7 on process 1 (b) and 0 on process 0 (a)"),
        (facts(replace(RUN, data__subset_weights={"x": 2.0})), 'config.data.subset_weights is {"x": 2.0}'),
        (facts(replace(RUN, model__remat="full")), 'config.model.remat is "full" on process 1 (b)'),
        (facts(RUN, **{"data (all)": "cd"}), 'data (all) is "cd" on process 1 (b) and "ab" on process 0 (a)'),
        (facts(RUN, **{"code of medcg_jax": "x"}), 'code of medcg_jax is "x" on process 1 (b)'),
        (facts(RUN, **{"version of jax": "0.1"}), 'version of jax is "0.1" on process 1 (b)'),
        (facts(RUN, **{"--workdir": "/v"}), '--workdir is "/v" on process 1 (b) and "/w" on process 0 (a)'),
        (facts(RUN, verb="eval"), 'verb is "eval"'),
        (facts(RUN, extra="3"), 'extra is "3" on process 1 (b) and null'),
    ],
)
def test_what_a_process_does_not_share_is_named_with_both_values(monkeypatch, theirs, said):
    monkeypatch.setattr(processes, "count", lambda: 2)
    own = json.loads(json.dumps(facts(RUN)))
    told = []

    def gather(name, value):
        told.append(value)
        return json.loads(json.dumps([["process 0 (a)", own], ["process 1 (b)", theirs]]))

    monkeypatch.setattr(processes, "gather", gather)
    with pytest.raises(ConfigError) as refused:
        agreement.check_agreement(RUN, "train", cli.Path("/w"), lambda: {"all": "ab"})
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
    assert len(told) == 1 and json.loads(json.dumps(told[0][1])) == own  # all of it in one message


def test_the_log_may_be_each_process_s_own(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    other = facts(replace(RUN, log__tensorboard=False))
    monkeypatch.setattr(processes, "gather", lambda name, value: [["a", facts(RUN)], ["b", other]])
    agreement.check_agreement(RUN, "train", cli.Path("/w"), lambda: {"all": "ab"})


def test_a_process_alone_opens_no_data_for_it():
    agreement.check_agreement(RUN, "train", cli.Path("/w"), lambda: pytest.fail("nothing is to be read"))


def test_a_start_that_is_refused_is_one_line_and_status_2(capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = [f"--coordinator=127.0.0.1:{other.getsockname()[1]}", "--num_processes=2", "--process_id=0"]
        argv = ["train", "--config=configs/phantom.py:tiny", f"--workdir={tmp_path / 'run'}", *place]
        assert cli.main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("medcg: coordinator 127.0.0.1:")
    assert not (tmp_path / "run").exists()
