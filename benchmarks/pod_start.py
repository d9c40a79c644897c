"""Seconds and bytes of a start on 64 hosts, part by part: `python -m benchmarks.pod_start [SIZE ...]`.

From the start of a process until its first step is handed to the devices, for a first start (weights of a release) and one from the run's
checkpoint (parameters and moments in float32). What the process does itself is measured here on this machine's cores by
`benchmarks.startup`, programs from the cache, or taken from its record; what waits for storage and links is computed:
bytes of `benchmarks.bytes_per_host` at the bandwidths that the flags state. No pod was started. Left out: the queue, the
processes' meeting (they wait for the slowest), page caches, and storage that answers slower to many readers.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import jax

from benchmarks import bytes_per_host, startup
from benchmarks.records import write_record
from medcg_jax.chips import peak_of
from medcg_jax.families import build
from medcg_jax.families.weights.convert import read_config

# Qwen/Qwen2-VL-72B-Instruct, config.json.
QWEN2_VL_72B = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_size": 8192,
    "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "hidden_act": "silu", "tie_word_embeddings": False, "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "bos_token_id": 151643, "eos_token_id": 151645,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 8192, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "model_type": "qwen2_vl",
    },
}  # fmt: skip
# Size -> the config whose start is measured: layers are a scan, so the 72B's program is as long as the 7B's.
CONFIGS = {
    "llava15_7b": "configs/llava15_7b.py",
    "llava15_13b": "configs/llava15_7b.py:13b",
    "qwen2_vl_72b": "configs/qwen2_vl_7b.py",
}
MOMENTS_AND_PARAMETERS = 3 * 4  # bytes of a trained number in a checkpoint


def config_of(size: str):
    """The architecture of a size; of the 72B by its release's config.json."""
    if size in build.SIZES:
        return build.SIZES[size]()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN2_VL_72B))
        return read_config(Path(folder))


def computed(size: str, args: argparse.Namespace) -> dict[str, float]:
    """Bytes and seconds of what storage and links do."""
    of_host, hosts = bytes_per_host.measure(config_of(size)), bytes_per_host.HOSTS
    peak = peak_of(args.device)
    assert peak is not None and peak.link_bytes_per_s
    per_host = min(args.storage_gb_per_s * 1e9 / hosts, args.nic_gb_per_s * 1e9)
    state = of_host["held"] // bytes_per_host.ITEM * MOMENTS_AND_PARAMETERS
    return {
        "release_bytes": of_host["bytes"],
        "read_bytes_per_host": of_host["released"],
        "read_over_held": of_host["released_over_held"],
        "read_s": of_host["released"] / per_host,
        # A device may be sent all rows of each layer before it keeps its slice.
        "exchange_s": of_host["bytes"] / peak.link_bytes_per_s,
        "state_bytes_per_host": state,
        "state_s": state / per_host,
        # As where each host's slices of columns make it read all pages of the file.
        "all_pages_s": of_host["bytes"] / per_host,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", default=[*CONFIGS], metavar="SIZE")
    parser.add_argument(
        "--storage_gb_per_s", type=float, default=40.0, help="of the shared storage, for all hosts; assumed (40)"
    )
    parser.add_argument("--nic_gb_per_s", type=float, default=12.5, help="of a host's network (12.5: 100 Gbit/s)")
    parser.add_argument("--device", default="TPU v5 lite", help="whose links exchange rows (TPU v5 lite)")
    parser.add_argument("--records", type=int, default=100, help="of each phantom subset in what is measured (100)")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := sorted({*args.sizes} - {*CONFIGS}):
        parser.error(f"{', '.join(unknown)}: accepted are {', '.join(CONFIGS)}")
    result = {}
    for size in args.sizes:
        asked = argparse.Namespace(config=CONFIGS[size], devices=8, records=args.records)
        flags = ["--config.model.scan_unroll=1"]
        with tempfile.TemporaryDirectory() as cache:
            startup.measure(asked, flags, cache)
            warm = startup.measure(asked, flags, cache)
        result[size] = {"process": warm["parts"], "compiled": warm["compiled"]} | computed(size, args)
    flags_line = f"storage {args.storage_gb_per_s:g} GB/s for all, network {args.nic_gb_per_s:g} GB/s a host"
    print(f"{bytes_per_host.HOSTS} hosts of {bytes_per_host.DEVICES_PER_HOST} {args.device}; {flags_line}")
    for size, start in result.items():
        process_s = math.fsum(wall for _, wall, _ in start["process"])
        parts = ", ".join(f"{name} {wall:.1f}" for name, wall, _ in start["process"])
        print(f"{size}: measured with {CONFIGS[size]} {process_s:.1f} s of a process ({parts})")
        print(
            f"  computed: weights {start['read_s']:.1f} s ({start['read_bytes_per_host'] / 1e6:.0f} MB a host, "
            f"{start['read_over_held']:.2f} of what its devices hold), exchange {start['exchange_s']:.2f} s; "
            f"until the first step is handed over {process_s + start['read_s'] + start['exchange_s']:.1f} s\n"
            f"  from a checkpoint: {start['state_s']:.1f} s more ({start['state_bytes_per_host'] / 1e6:.0f} MB a host); "
            f"if every host read all pages of the release: {start['all_pages_s']:.1f} s"
        )
    write_record(args.json, {"flags": vars(args) | {"json": ""}, "sizes": result})
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", bytes_per_host.HOSTS * bytes_per_host.DEVICES_PER_HOST)
    sys.exit(main())
