"""Traces: one made by hand whose sums are known, one of a CPU, and what is no trace."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from medcg_jax.bench import trace_read
from medcg_jax.data.records import DataError

# Stream 1: a product of 4 us, a gap of 2, attention of 2, a fusion of 1. Stream 2: a copy of 3 us beside the product.
# Derived lines say the same again, and the host's do not count.
GPU = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #1(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 stats { metadata_id: 1 str_value: "custom-call.7" } }
    events { metadata_id: 2 offset_ps: 6000000 duration_ps: 2000000 }
    events { metadata_id: 3 offset_ps: 8000000 duration_ps: 1000000 }
  }
  lines {
    name: "Stream #2(MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 4 offset_ps: 500000 duration_ps: 3000000 }
  }
  lines { name: "Steps" timestamp_ns: 1000 events { metadata_id: 5 offset_ps: 0 duration_ps: 90000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_tst_128x256_64x4" } }
  event_metadata { key: 2 value { id: 2 name: "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma" } }
  event_metadata { key: 3 value { id: 3 name: "loop_convert_fusion" } }
  event_metadata { key: 4 value { id: 4 name: "MemcpyD2D" } }
  event_metadata { key: 5 value { id: 5 name: "1" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes {
  name: "/host:CPU"
  lines { name: "python" events { metadata_id: 1 offset_ps: 0 duration_ps: 90000000 } }
  event_metadata { key: 1 value { id: 1 name: "dot" } }
}
"""
# A loop of 10 us on a TPU around a fusion of 6 whose category says that it is a product; a reduction over devices of 2.
TPU = """
planes {
  name: "/device:TPU:0"
  lines {
    name: "XLA Ops"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000 }
    events {
      metadata_id: 2 offset_ps: 1000000 duration_ps: 6000000
      stats { metadata_id: 1 str_value: "convolution fusion" }
    }
    events { metadata_id: 3 offset_ps: 10000000 duration_ps: 2000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "while.3" } }
  event_metadata { key: 2 value { id: 2 name: "fusion.12" } }
  event_metadata { key: 3 value { id: 3 name: "all-reduce.4" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_category" } }
}
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return path


def test_a_gpus_time_by_kind_adds_up(tmp_path, capsys):
    write(tmp_path / "plugins" / "profile" / "now" / "host.xplane.pb", GPU)
    assert trace_read.main([str(tmp_path), "--steps=2", f"--json={tmp_path}/out.json"]) == 0
    trace = json.loads((tmp_path / "out.json").read_text())
    assert trace["device"] == "/device:GPU:0" and trace["num_devices"] == 1
    microseconds = {kind: round(times["seconds"] * 1e6, 6) for kind, times in trace["kinds"].items()}
    assert microseconds == {
        "collectives": 0, "attention": 2, "matrix products": 4, "copies": 3, "other fusions": 1, "idle": 2
    }  # fmt: skip
    assert trace["span_s"] == pytest.approx(9e-6) and trace["busy_s"] == pytest.approx(7e-6)
    assert trace["longest_gap_s"] == pytest.approx(2e-6)
    assert trace["kinds"]["matrix products"]["share"] == pytest.approx(4 / 9)
    assert trace["longest"][0]["name"] == "nvjet_tst_128x256_64x4 [custom-call.7]"
    out = capsys.readouterr().out
    assert "0.0 ms a step" in out and "nvjet" in out and "idle" in out


def test_what_a_loop_holds_counts_once(tmp_path):
    trace = trace_read.read(write(tmp_path / "host.xplane.pb", TPU))
    microseconds = {kind: round(times["seconds"] * 1e6, 6) for kind, times in trace["kinds"].items()}
    assert microseconds["matrix products"] == 6 and microseconds["collectives"] == 2
    assert microseconds["other fusions"] == 0
    # The loop's own time, in which none of its operations ran.
    assert trace["span_s"] == pytest.approx(11e-6) and trace["idle_s"] == pytest.approx(3e-6)


def test_one_operation_inside_another_leaves_it_the_rest():
    def op(name, start, end):
        return trace_read.Op(name, "copies", "line", start, end)

    ops = [op("outer", 0, 10), op("inner", 2, 5), op("innermost", 3, 4), op("next", 10, 12)]
    assert {inside.name: seconds for inside, seconds in trace_read.own_times(ops)} == {
        "outer": 7, "inner": 2, "innermost": 1, "next": 2
    }  # fmt: skip


def test_seconds_are_the_mean_over_devices(tmp_path):
    both = GPU + GPU.replace("GPU:0", "GPU:1").replace("duration_ps: 4000000", "duration_ps: 6000000")
    trace = trace_read.read(write(tmp_path / "host.xplane.pb", both))
    assert trace["num_devices"] == 2
    assert trace["kinds"]["matrix products"]["seconds"] == pytest.approx(5e-6)
    assert trace["idle_s"] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemm_fusion_dot_12", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "matrix products"),
        ("cublasLt::splitKreduce_kernel", "matrix products"),
        ("ncclDevKernel_AllGather_RING_LL", "collectives"),
        ("reduce-scatter.3", "collectives"),
        ("input_reduce_fusion", "other fusions"),
        ("loop_dynamic_update_slice_fusion", "copies"),
        ("loop_transpose_fusion", "copies"),
        ("wrapped_convert", "other fusions"),
        ("loop_recompute_dotted", "other fusions"),
        ("fmha_cutlassF_bf16_aligned", "attention"),
    ],
)
def test_names_have_kinds(name, kind):
    assert trace_read.kind_of(name) == kind


def test_a_trace_of_this_machine_finds_its_products(tmp_path):
    x = jnp.ones((256, 256))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    jax.profiler.start_trace(tmp_path)
    for _ in range(3):
        product(x).block_until_ready()
    jax.profiler.stop_trace()
    trace = trace_read.read(tmp_path)
    assert trace["device"] == "/host:CPU"
    assert trace["kinds"]["matrix products"]["seconds"] > 0
    assert trace["longest"][0]["kind"] == "matrix products" and trace["longest"][0]["count"] % 3 == 0


def test_what_is_no_trace_is_one_line(tmp_path, capsys):
    with pytest.raises(DataError, match="no .*xplane.pb"):
        trace_read.read(tmp_path)
    (tmp_path / "a.xplane.pb").write_bytes(b"no trace at all")
    with pytest.raises(DataError, match="a.xplane.pb"):
        trace_read.read(tmp_path)
    write(tmp_path / "a.xplane.pb", 'planes { name: "/device:GPU:0" }')
    assert trace_read.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_newest_trace_is_read(tmp_path):
    import os

    old = write(tmp_path / "1" / "host.xplane.pb", GPU)
    os.utime(old, (1, 1))
    write(tmp_path / "0" / "host.xplane.pb", TPU)
    assert trace_read.read(tmp_path)["device"] == "/device:TPU:0"
