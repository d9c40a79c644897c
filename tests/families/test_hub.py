"""Checkpoints and data by their name on the hub, from a small hub on loopback."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from releases import CONFIGS
from small_hub import TOKEN, Repository, SmallHub, commit_of

from medcg_jax import processes
from medcg_jax.cli import main
from medcg_jax.config import AUTO, ConfigError, RunConfig, RunError, replace
from medcg_jax.families.weights import hub as names
from medcg_jax.families.weights.convert import module_of
from medcg_jax.families.weights.hub import chosen_files, is_repository, pinned, resolve
from medcg_jax.train import start

NAME = "owner/small-llava"
ABOUT = json.dumps(module_of(CONFIGS["llava"]).config_to_json(CONFIGS["llava"], "float32")).encode()
# Files of equal bytes are fetched once.
TOKENIZER = b'{"of": "text"}'
SETTINGS = {
    "config.json": ABOUT,
    "tokenizer.json": TOKENIZER,
    "chat_template.jinja": b"x",
    "preprocessor_config.json": b'{"of": "images"}',
}
WEIGHTS = {"model-00001-of-00002.safetensors": b"a" * 900, "model-00002-of-00002.safetensors": b"b" * 800}
INDEX = {"model.safetensors.index.json": b'{"of": "shards"}'}
OTHERS = {
    "pytorch_model.bin": b"c" * 700, "onnx/model.onnx": b"d" * 99, "model.gguf": b"e", "flax_model.msgpack": b"f",
    "consolidated.safetensors": b"g", "model.fp16.safetensors": b"h", "original/params.json": b"{}", "README.md": b"#",
    "onnx/config.json": b"{}",
}  # fmt: skip
FILES = SETTINGS | WEIGHTS | INDEX | OTHERS


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The small hub with one repository; `huggingface_hub` in this process asks it, and has an empty cache."""
    import huggingface_hub.file_download
    from huggingface_hub import constants

    with SmallHub() as served:
        served.repositories[f"models/{NAME}"] = Repository(dict(FILES))
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        # Between attempts it waits for a second and more.
        monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        names.fetched.cache_clear()
        yield served
        names.fetched.cache_clear()


def offline(monkeypatch) -> None:
    from huggingface_hub import constants

    names.fetched.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def held(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refused(kind, message: str, name: str = NAME, **options) -> str:
    with pytest.raises(kind, match=message) as error:
        resolve(name, **options)
    assert "\n" not in str(error.value) and str(error.value).startswith(name)
    return str(error.value)


def test_only_what_a_checkpoint_needs_is_fetched_and_only_once(hub, capsys):
    folder = resolve(NAME)
    assert hub.fetched() == held(folder) == {*SETTINGS, *WEIGHTS, *INDEX}
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == b"a" * 900
    line = capsys.readouterr().out
    assert line.startswith(f"fetching {NAME}@{commit_of(FILES)[:10]}: 6 files, ") and line.count("\n") == 1
    names.fetched.cache_clear()
    assert resolve(pinned(NAME)) == folder and not hub.fetched() and not capsys.readouterr().out


def test_a_plan_fetches_no_weights_and_a_run_the_rest(hub):
    folder = resolve(NAME, weights=False)
    assert hub.fetched() == held(folder) == {*SETTINGS, *INDEX}
    assert resolve(NAME) == folder and hub.fetched() == {*WEIGHTS}


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        ("config.json pytorch_model.bin pytorch_model.bin.index.json", "config.json pytorch_model.bin pytorch_model.bin.index.json"),
        ("config.json pytorch_model-00001-of-00002.bin training_args.bin optimizer.pt", "config.json pytorch_model-00001-of-00002.bin"),
        ("adapter_config.json adapter_model.safetensors adapter_model.bin", "adapter_config.json adapter_model.safetensors"),
        ("adapter_config.json adapter_model.bin non_lora_trainables.bin", "adapter_config.json adapter_model.bin non_lora_trainables.bin"),
        ("model.json params/d/0 params/_METADATA meta.json", "model.json params/d/0 params/_METADATA meta.json"),
        ("additional_chat_templates/tool.jinja onnx/model.onnx tf_model.h5 model.safetensors", "additional_chat_templates/tool.jinja model.safetensors"),
    ],
)  # fmt: skip
def test_of_two_forms_one_is_chosen(paths, chosen):
    assert chosen_files(paths.split(), weights=True) == set(chosen.split())


def test_a_revision_is_a_commit_from_then_on(hub):
    repository = hub.repositories[f"models/{NAME}"]
    repository.branches["v2"] = other = FILES | {"tokenizer.json": b'{"other": 1}'}
    first = pinned(NAME)
    assert first == f"{NAME}@{commit_of(FILES)}" and pinned(first) == first
    assert pinned(f"{NAME}@v2") == f"{NAME}@{commit_of(other)}"
    assert (resolve(f"{NAME}@v2") / "tokenizer.json").read_bytes() == b'{"other": 1}'
    repository.move(FILES | {"tokenizer.json": b'{"newer": 1}'})
    assert pinned(NAME) != first
    assert (resolve(first) / "tokenizer.json").read_bytes() == TOKENIZER
    refused(ConfigError, "owner/small-llava has no revision v9; see http", f"{NAME}@v9")


def test_a_local_folder_wins(hub, tmp_path):
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    assert resolve(NAME) == Path(NAME) and pinned(NAME) == NAME
    for path in ("checkpoints/small-llava", "runs/first", "./owner/other", "/owner/other", "owner/a/b", "owner", ""):
        assert not is_repository(path) and resolve(path) == Path(path)
    assert not hub.asked
    refused(ConfigError, f"{NAME} is a folder here, which has no revisions", f"{NAME}@v2")


def test_what_is_gated_opens_with_a_token(hub, monkeypatch):
    hub.repositories[f"models/{NAME}"].gated = True
    told = refused(ConfigError, "is gated: accept its terms at")
    assert f"{hub.address}/{NAME}" in told and "hf auth login" in told
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(ConfigError, "is gated: accept its terms at")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert {*WEIGHTS} <= held(resolve(NAME))


def test_what_is_not_there_is_said(hub):
    told = refused(ConfigError, "there is no such folder here, and none of that name at", "owner/missing")
    assert "hf auth login" in told
    hub.repositories["models/owner/text"] = Repository({"README.md": b"#"})
    refused(ConfigError, "has no config.json", "owner/text")


def test_without_a_hub_the_cache_serves_and_an_empty_one_is_said(hub):
    from huggingface_hub.utils import close_session

    folder = resolve(NAME)
    names.fetched.cache_clear()
    hub.stop()
    close_session()  # it keeps connections, and the hub the threads that serve them
    assert resolve(NAME) == folder
    refused(RunError, "could not be fetched whole from http.*the same command goes on", "owner/other")


def test_offline_the_cache_serves_and_what_it_lacks_is_said(hub, monkeypatch):
    folder = resolve(NAME, weights=False)
    offline(monkeypatch)
    hub.asked.clear()
    assert resolve(NAME, weights=False) == folder
    refused(ConfigError, "is not whole in the cache .*HF_HUB_OFFLINE is set; unset it once")
    refused(ConfigError, "is not whole in the cache", "owner/other")
    assert not hub.asked


def test_a_cache_that_another_program_filled_serves_offline(hub, monkeypatch):
    """transformers fetches file by file, and keeps no list of a repository's files."""
    folder = resolve(NAME)
    shutil.rmtree(folder.parents[1] / "trees")
    offline(monkeypatch)
    assert resolve(NAME) == folder


def test_a_download_that_broke_off_goes_on(hub):
    file = "model-00001-of-00002.safetensors"
    cut = hub.repositories[f"models/{NAME}"].cut
    cut[file] = 1
    assert (resolve(NAME) / file).read_bytes() == b"a" * 900
    names.fetched.cache_clear()
    shutil.rmtree("cache")
    cut[file] = 1000
    refused(RunError, "could not be fetched whole")
    assert not [path for path in Path("cache").rglob(file) if path.is_file()]
    cut.clear()
    assert (resolve(NAME) / file).read_bytes() == b"a" * 900


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/owner/small-llava", "owner/small-llava"),
        ("https://hf.co/owner/small-llava/", "owner/small-llava"),
        ("https:/huggingface.co/owner/small-llava", "owner/small-llava"),
        ("https://huggingface.co/owner/small-llava/tree/main", "owner/small-llava"),
        ("https://huggingface.co/owner/small-llava/blob/v1/config.json?x=1", "owner/small-llava@v1"),
        ("https://huggingface.co/owner/small-llava.git", "owner/small-llava"),
        ("hf://owner/small-llava", "owner/small-llava"),
        ("hf://owner/small-llava@v1/config.json", "owner/small-llava@v1"),
        ("https://huggingface.co/datasets/owner/images", "owner/images"),
    ],
)
def test_an_address_is_refused_with_the_name_to_give(address, name, capfd, tmp_path):
    for call in (is_repository, resolve, pinned, lambda text: names.fetch_data(text, tmp_path / "new")):
        with pytest.raises(ConfigError) as error:
            call(address)
        assert str(error.value) == f"{address} is an address; give the repository by its name: {name}"
    for command in (
        ["convert", address, "out"], ["parity", address],
        ["train", "--config=configs/llava15_7b.py", f"--config.model.checkpoint={address}", f"--workdir={tmp_path}/w"],
    ):  # fmt: skip
        assert main(command) == 2
        shown = capfd.readouterr().err
        assert f"give the repository by its name: {name}" in shown and shown.count("\n") == 1


def test_an_address_of_no_repository_says_the_form():
    for address in ("https://example.org", "https://huggingface.co/owner", "hf://x"):
        with pytest.raises(
            ConfigError, match="is an address; expected a folder, or a repository of the hub as OWNER/NAME"
        ):
            resolve(address)
    assert is_repository("https/modules") and is_repository("hf/modules")


def test_a_warning_of_the_hub_is_one_line_and_told_once(capfd):
    """Its own handler and the root's would print it twice, and each new attempt is two warnings."""
    logger, root = logging.getLogger("huggingface_hub"), logging.getLogger()
    theirs, roots = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stderr)
    before = logger.propagate
    logger.addHandler(theirs)
    root.addHandler(roots)
    try:
        logger.propagate = True
        handlers = logger.handlers[:]
        with names.refusals(NAME):
            for number in (1, 2, 3):
                logging.getLogger("huggingface_hub.utils._http").warning("'refused'\n thrown while requesting GET x")
                logging.getLogger("huggingface_hub.utils._http").warning(f"Retrying in {number}s [Retry {number}/5].")
            logging.getLogger("huggingface_hub.file_download").warning("another")
        assert capfd.readouterr().err.splitlines() == [
            f"{NAME}: 'refused' thrown while requesting GET x; trying again", f"{NAME}: another"
        ]  # fmt: skip
        assert logger.handlers == handlers and logger.propagate
    finally:
        logger.removeHandler(theirs)
        root.removeHandler(roots)
        logger.propagate = before


def test_a_hub_that_breaks_off_warns_once_a_fault(hub, capfd):
    hub.repositories[f"models/{NAME}"].cut["model-00001-of-00002.safetensors"] = 3
    resolve(NAME)
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert lines and len(set(lines)) == len(lines) and all(line.startswith(f"{NAME}: ") for line in lines)


def test_a_mirror_that_lists_no_sizes_serves_too(hub, monkeypatch):
    hub.repositories[f"models/{NAME}"].has_tree = False
    folder = resolve(NAME)
    assert held(folder) == {*SETTINGS, *WEIGHTS, *INDEX} and not hub.fetched() - held(folder)
    offline(monkeypatch)
    assert resolve(NAME) == folder


def test_what_this_port_does_not_compute_is_refused_before_its_weights_are_fetched(hub, capfd):
    about = json.loads(ABOUT)
    about["text_config"]["model_type"] = "gemma"
    hub.repositories["models/owner/gemma"] = Repository(FILES | {"config.json": json.dumps(about).encode()})
    Image.new("RGB", (9, 9)).save("a.png")
    for command in (["convert", "owner/gemma", "out"], ["ask", "owner/gemma", "a.png", "Is it?"]):
        assert main(command) == 2
        assert "gemma" in capfd.readouterr().err and not {*WEIGHTS} & hub.fetched()


def test_adapters_alone_are_a_checkpoint_whose_base_is_asked_for(hub):
    hub.repositories["models/owner/lora"] = Repository(
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"}
    )
    assert held(resolve("owner/lora")) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_disk_without_room_is_named_before_weights_are_fetched(hub, monkeypatch):
    monkeypatch.setattr(names.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    told = refused(ConfigError, "are to be fetched and 1.0 MB are free in .*cache; make room")
    assert "HF_HOME" in told and hub.fetched() == {"config.json"}


def test_a_run_is_named_by_commit_and_family(hub):
    run = replace(
        RunConfig(), model__name=AUTO, model__checkpoint=NAME,
        study__model_flags={"llava": (f"model.checkpoint={NAME}", "train.steps=2")},
    )  # fmt: skip
    ready, commit = start.with_checkpoint(run), f"{NAME}@{commit_of(FILES)}"
    assert (ready.model.name, ready.model.checkpoint) == ("llava", commit)
    assert ready.study.model_flags == {"llava": (f"model.checkpoint={commit}", "train.steps=2")}
    assert not {*WEIGHTS} & hub.fetched()
    assert start.with_checkpoint(ready) == ready and not hub.fetched()
    assert start.weights_dir(ready.model) == start.checkpoint_dir(ready.model) and {*WEIGHTS} == hub.fetched()


def test_of_a_host_s_processes_the_first_fetches(hub, monkeypatch):
    hosts = {0: "a", 1: "b", 2: "b", 3: "a"}
    firsts = []
    for index in hosts:
        monkeypatch.setattr(processes, "_processes", SimpleNamespace(index=index, hosts=hosts))
        firsts.append(processes.is_first_of_host())
    assert firsts == [True, True, False, False]
    monkeypatch.setattr(processes, "_processes", None)
    model, order = replace(RunConfig(), model__name="llava", model__checkpoint=NAME).model, []
    for first in (True, False):
        names.fetched.cache_clear()
        shutil.rmtree("cache", ignore_errors=True)
        monkeypatch.setattr(start, "is_first_of_host", lambda first=first: first)
        monkeypatch.setattr(start, "barrier", lambda *_: order.append(len(hub.fetched())))
        start.weights_dir(model)
        order.append(len(hub.fetched()))
    assert order == [7, 0, 0, 7]  # the others fetch only what is not in a cache that they share


def test_questions_are_fetched_and_the_images_hosts_are_named(hub, tmp_path, capsys):
    hub.repositories["datasets/FreedomIntelligence/Med-MAT"] = Repository(
        {"ori-04-train.json": b"[]", "a/b.json": b"{}"}
    )
    assert main(["data", "fetch", "04", "tree", "--json=found.json"]) == 0
    shown = capsys.readouterr().out
    assert held(tmp_path / "tree") >= {"ori-04-train.json", "a/b.json"}
    found = json.loads(Path("found.json").read_text())
    assert found["folder"] and all(address in shown for where in found["elsewhere"].values() for address in where)
    assert found["elsewhere"] and "terms of its own" in shown
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ori-04-train.json").write_text("[1]")
    for command, message in (
        (["data", "fetch", "04", "mine"], "mine has files that were not fetched from the hub"),
        (["data", "fetch", "99"], "99: expected OWNER/NAME of the Hugging Face hub, Med-MAT, or a subset"),
        (["data", "fetch", "owner/missing", "new"], "there is no such folder here, and none of that name"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (tmp_path / "mine" / "ori-04-train.json").read_text() == "[1]" and not held(tmp_path / "new")


@pytest.mark.long
def test_verbs_take_names_in_a_process_of_their_own(hub, tmp_path):
    """HF_ENDPOINT and HF_HOME as a user sets them; every refusal is one line."""
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}

    def medcg(*arguments: str, **changes: str) -> tuple[int, str]:
        program = "import sys; from medcg_jax.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=environment | changes, capture_output=True, text=True,
            timeout=300, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""

    status, line = medcg("convert", "owner/missing", "out")
    assert status == 2 and line.startswith("medcg: owner/missing: there is no such folder here")
    status, line = medcg("convert", NAME, "out", HF_HUB_OFFLINE="1")
    assert status == 2 and "HF_HUB_OFFLINE is set" in line
    status, line = medcg("convert", NAME, "out", HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 1 and "could not be fetched whole" in line
    status, line = medcg("convert", NAME, "out")  # the tensors are none
    assert status == 2 and "safetensors" in line and {*WEIGHTS} <= hub.fetched()
