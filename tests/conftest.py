"""Settings and fixtures that every test shares: 8 simulated CPU devices, full matmul precision, the shared folder.

The settings are environment variables, set before anything imports jax, so that processes which tests start have them.
"""

import io
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medcg_jax" / "tests"
# Families of models: tests of one family share its compiled programs (`family_toys`), in whatever file they stand.
FAMILIES = ("llava", "qwen2_vl", "mllama", "minigpt_v2", "next_chat")


def quick_compiles() -> list[str]:
    """Flags with which XLA leaves out LLVM's optimisations: tests compile hundreds of programs and run each a few times.

    A training step of eight devices compiled in a quarter of the time (2.3 of 10.8 s, 2.6 of 10.6 s on jax 0.11) and ran
    half as fast. What is computed, and how it is split over devices, stays as it is.
    """
    newer = tuple(map(int, version("jax").split(".")[:2])) >= (0, 11)
    # The same switch: an option of its own, and since 0.11 one of several in one option.
    emitters = "backend_extra_options=xla_cpu_disable_new_fusion_emitters" if newer else "cpu_use_fusion_emitters=false"
    return ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", f"--xla_{emitters}"]


def settings() -> dict[str, str]:
    """Environment variables of a test run; those that the caller has set already stay as they are."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags = " ".join([flags, f"--xla_force_host_platform_device_count={NUM_DEVICES}", *quick_compiles()]).strip()
    wanted = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        # Compiled programs are kept between test runs, for all checkouts of a user: the same programs, only sooner.
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / f"jax-{version('jax')}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Workers share the cores: threads of torch that spin while they wait would halve the speed of the others.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {"XLA_FLAGS": flags} | {name: os.environ.get(name, value) for name, value in wanted.items()}


if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could ask for 8 simulated devices")
os.environ.update(settings())


# Tests beyond those marked in their files that take tens of seconds: FILE::TEST, or FILE::TEST[PARAMETER]. Of several
# families or dtypes one runs by default.
LONG = (
    "test_backbones::test_every_model_leaves_a_grid", "test_backbones::test_boxes_are_scored_apart",
    "test_backbones::test_the_page_comes_again", "test_grounding::test_what_was_learnt_is_found",
    "test_matmul::test_a_step_learns_as_it_does_without", "test_qwen2_vl::test_gradients_and_ten_adamw_steps",
    "test_kill_processes::test_killed", "test_golden::test_minigpt_of_other_sizes",
    "test_slices::test_on_eight_devices_the_numbers_are_those_of_the_release[next_chat]",
    "test_slices::test_on_eight_devices_the_numbers_are_those_of_the_release[mllama]",
    "test_slices::test_of_heads_that_devices_share", "test_sam::test_gradients_of_the_masks",
    "test_adapters::test_what_was_trained_alone", "test_silent_faults::test_new_gates_are_not_inert",
    "test_quant::test_errors_are_those_of_the_codes_and_a_second_time_changes_nothing[nf4]",
    "test_weights_families::test_there_and_back[next_chat]",
    "test_weights_families::test_missing_unused_and_misshapen_tensors_and_names_held_twice_stop_the_load[next_chat]",
    "test_weights_families::test_tensors_of_another_model_are_refused_with_their_file[next_chat]",
    "test_streaming::test_a_stack_is_never_held_whole", "test_streaming::test_on_disk_no_piece_holds",
    "test_lora_families::test_every_adapter_is_in_the_text_and_decoding_is_training[llama32_vision_tiny]",
    "test_lora_families::test_every_adapter_is_in_the_text_and_decoding_is_training[next_chat_tiny]",
    "test_parity_any::test_a_model_whose_gates_are_shut", "test_mllama_groups::test_groups_that_are_not_equal",
    "test_report_text::test_what_an_element_is_worth_is_said_as_it_is[0.0", "test_adapters_and_bases::",
    "test_report_text::test_what_an_element_is_worth_is_said_as_it_is[0.65",
)  # fmt: skip
# Files that the second Python runs: what knows JAX, and what its packages' versions could change.
SMOKE = (
    "test_attention", "test_blocks", "test_build", "test_config", "test_imports", "test_layers", "test_losses",
    "test_optim", "test_pipeline", "test_rope", "test_step", "test_letters", "test_stats", "test_checksums",
)  # fmt: skip


def pytest_itemcollected(item):
    """Marks long tests, and those of the smoke run."""
    if f"{item.path.stem}::{item.name}".startswith(LONG):
        item.add_marker(pytest.mark.long)
    if item.path.stem in SMOKE:
        item.add_marker(pytest.mark.smoke)


def group_of(nodeid: str) -> str:
    """What a test shares its compiled programs with: its family, where that is a parameter, else its file."""
    path, _, name = nodeid.partition("::")
    parameters = name.partition("[")[2].rstrip("]").split("-")
    return next((family for family in FAMILIES if family in parameters), path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs a group whole. (xdist's own groups, `--dist=loadgroup`, do nothing on pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout (paper tables, golden arrays, a small tree of real images)."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("../shared is not on this machine")
    return path


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    """The tokenizer of `record_sets`: a token a word."""
    from record_sets import write_word_tokenizer

    from medcg_jax.data.tokenizer import load_tokenizer

    return load_tokenizer(write_word_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json"))


@pytest.fixture(scope="session")
def llama_model_file(tmp_path_factory) -> Path:
    """A SentencePiece model of 420 pieces with the Llama family's settings: BPE, bytes, identity, a space in front."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: Which lung cancer category does this slice belong to? A: Malignant B: Normal C: Benign D: Severe "
        "Answer with the option's letter from the given choices directly. "
        "ASSISTANT: A</s>USER: and this one? ASSISTANT: B</s>USER: ASSISTANT: C the answer is D"
    )
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


def pytest_terminal_summary(terminalreporter):
    """Prints how many tests were skipped and why, whatever flags pytest was given."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(reason(report) for report in skipped)
    terminalreporter.section(f"skipped: {len(skipped)}")
    for text, number in reasons.most_common():
        terminalreporter.write_line(f"{number:5d}  {text}")


def reason(report) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
