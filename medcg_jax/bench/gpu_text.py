"""What the stages of `bench_gpu` come to: ratios of like with like, and a few lines for people."""

# Ratio -> (stage and kind of ours, stage and kind of theirs): rows are compared by their samples/s.
OWN_STATE, THEIR_STATE = ("train", "train_fp32"), ("torch", "torch_fp32")


def conclusions(stages: dict) -> dict:
    """{"ratios", "lines"} of what the stages found; a ratio without both of its sides is not there.

    ratios: ours over theirs in samples/s, above 1 is faster. train_best: the fastest step of each, state in bfloat16;
      train_fp32_best: the same with float32 weights; train_same_batch: at the largest batch that both ran without
      rematerialisation in bfloat16; letters_vs_generate, letters_vs_forward: both of batch 8;
      letters_best_vs_generate: ours at its own best batch.
    """
    lines, ratios = machine_lines(stages.get("machine", {})), {}
    theirs = [row for name in THEIR_STATE for row in measured(stages, name)]
    their_steps = [row for row in theirs if row["what"].startswith("train")]
    for dtype, name in (("bfloat16", "train_best"), ("float32", "train_fp32_best")):
        ours = fastest(row for stage in OWN_STATE for row in measured(stages, stage) if row["param_dtype"] == dtype)
        if ours:
            lines.append(f"full fine-tuning, state in {dtype}: {ours['case']}: {rate_text(ours)}")
        other = fastest(row for row in their_steps if row["param_dtype"] == dtype)
        if other:
            lines.append(f"transformers: {other['case']}: {other['samples_per_s']:.2f} samples/s")
        if ours and other:
            ratios[name] = ours["samples_per_s"] / other["samples_per_s"]
    same = [
        (row, other)
        for row in measured(stages, "train")
        for other in their_steps
        if row["remat"] == other["remat"] == "none" and row["batch_size"] == other["batch_size"]
        and row["param_dtype"] == other["param_dtype"] and other["what"] == "train"
    ]  # fmt: skip
    if same:
        ours, other = max(same, key=lambda pair: pair[0]["batch_size"])
        ratios["train_same_batch"] = ours["samples_per_s"] / other["samples_per_s"]
    letters = [row for row in measured(stages, "eval") if not row["num_new"]]
    best = fastest(letters)
    if best:
        lines.append(f"{best['case']}: {best['samples_per_s']:.1f} samples/s")
    for what in ("generate", "forward"):
        other = fastest(row for row in theirs if row["what"] == what)
        alike = fastest(row for row in letters if other and row["batch_size"] == other["batch_size"])
        if other and alike:
            ratios[f"letters_vs_{what}"] = alike["samples_per_s"] / other["samples_per_s"]
        if other and best:
            ratios[f"letters_best_vs_{what}"] = best["samples_per_s"] / other["samples_per_s"]
    adapters = fastest(measured(stages, "lora"))
    if adapters:
        lines.append(f"{adapters['case']}: {rate_text(adapters)}")
    lines += [f"{name}: {value:.2f}" for name, value in ratios.items()]
    lines += memory_lines(stages) + stages.get("trace", {}).get("limits", [])
    lines += [f"{name}: {stage['status']}" for name, stage in stages.items() if stage.get("status") != "done"]
    return {"ratios": ratios, "lines": lines}


def measured(stages: dict, name: str) -> list[dict]:
    return [row for row in stages.get(name, {}).get("rows", []) if row.get("samples_per_s")]


def fastest(rows) -> dict | None:
    return max(rows, key=lambda row: row["samples_per_s"], default=None)


def rate_text(row: dict) -> str:
    text = f"{row['samples_per_s']:.2f} samples/s"
    if row.get("mfu_of_measured") is not None:
        text += (f", model FLOPs {row['mfu_of_measured']:.1%} of the measured matrix rate "
                 f"({row['mfu_causal_of_measured']:.1%} with causal attention counted half)")  # fmt: skip
    return text + (f", MFU {row['mfu']:.1%} of the published peak" if row.get("mfu") is not None else "")


def machine_lines(machine: dict) -> list[str]:
    rate = machine.get("matmul", {}).get("flops_per_s")
    memory = machine.get("memory_bytes_per_s")
    lines = [f"{machine['num_devices']} x {machine['device']}"] if "device" in machine else []
    lines += [f"bfloat16 products: {rate / 1e12:.1f} TFLOP/s measured"] if rate else []
    return lines + ([f"memory: {memory / 1e12:.2f} TB/s measured"] if memory else [])


def memory_lines(stages: dict) -> list[str]:
    """The plan's peak beside the device's own, of the rows whose step set a new peak of their process."""
    lines = []
    for name in ("train", "train_fp32", "lora"):
        for row in measured(stages, name):
            plan, peak = row.get("plan_peak_bytes"), row.get("peak_bytes")
            if plan and peak and peak > (row.get("peak_bytes_before") or 0):
                gib = f"{plan / 2**30:.1f} GiB, the device's {peak / 2**30:.1f}"
                lines.append(f"peak by the plan: {gib} ({plan / peak:.3f} of it): {row['case']}")
    return lines
