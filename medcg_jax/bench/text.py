"""The text of `medcg bench`: a table for each stage, ratios, what each side of a comparison does, conclusions."""

# What a runner does, as the table says it.
DOES = {
    "port": "this port's step, as `medcg train` compiles it",
    "torch eager": "PyTorch: labels in, logits at all positions, rows padded to the longest, fused AdamW",
    "torch compile": "the same model by torch.compile, static shapes, graphs broken where transformers breaks them",
    "torch eager flash": "the same with FlashAttention 2",
    "port letters": "log-probabilities of the option letters, by `evaluate`: no token is generated",
    "port generate": "the same, and every row's new tokens",
    "torch forward": "model(**inputs).logits, the letters' log-probabilities of the last position taken",
    "torch generate": "model.generate, greedy, with its cache, never stopping early",
}
# Further differences between the sides of a comparison.
DIFFERENCES = (
    "weights are random on both sides, and both have this process's threads and allocator",
    "HF's pixels are normalised and on the device before; the port's are bytes, and normalised in its step",
    "the learning rate is the port's schedule and HF's constant; both clip the gradient's norm",
    "HF's tower runs every layer, without gradients where it is frozen; our CLIP ends where its features are taken",
    "rows of a batch are as long as the longest for HF, as long as data.max_text_tokens allows for the port",
)


def text_of(result: dict) -> str:
    """The text of a result of `run.bench`."""
    versions = result.get("versions", {})
    packages = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "transformers") if name in versions)
    mesh = f", mesh {'x'.join(str(n) for n in result['mesh'].values())}" if "mesh" in result else ""
    where = f"{result['num_devices']} x {result['device']}{mesh}" if "device" in result else "no device"
    lines = [f"{result['model']} ({result['name']}), random weights, on {where}, {result['compute_dtype']}; {packages}"]
    for name, section in (("train", _train), ("answers", _answers), ("loader", _loader), ("convert", _convert),
                          ("startup", _startup)):  # fmt: skip
        if name in result:
            lines += ["", *section(result)]
    if result["ratios"]:
        lines += ["", *_ratios(result), *(f"  {text}" for text in DIFFERENCES)]
    if result["conclusions"]["lines"]:
        lines += ["", "== what it comes to", *(f"   {line}" for line in result["conclusions"]["lines"])]
    memory = result["memory"]
    if memory.get("host_peak_bytes"):
        device = f", device {_bytes(memory['device_peak_bytes'])}" if memory.get("device_peak_bytes") else ""
        lines += ["", f"most memory in use by one stage: host {_bytes(memory['host_peak_bytes'])}{device}"]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _train(result: dict) -> list[str]:
    train, matrix = result["train"], result["train"]["matrix"]
    batch, compiled, needed = train["batch"], train["compile"], train["flops"]
    lines = [f"training step: batch {batch['size']} x {batch['length']} tokens ({batch['real_tokens']} real), "
             f"{batch['targets_per_row']} places for targets a row; trains {', '.join(result['trainable'])}"
             + (f"; HF's rows have {train['torch_length']}" if "torch_length" in train else ""),
             *([f"  in PyTorch: {train['torch_model']}"] if "torch_model" in train else []),
             (f"  lowered in {compiled['lower_s']:.1f} s, compiled in {compiled['compile_s']:.1f} s; attention "
             f"{compiled['attention']}; program {_bytes(compiled['program_bytes'])}")]  # fmt: skip
    if needed:
        lines.append(f"  model FLOPs: {needed['full']:.4g} attention as the full square, {needed['causal']:.4g} "
                     f"causal; executed {needed['executed']:.4g}")  # fmt: skip
    lines.append(
        f"  {matrix['dtype']} product of {matrix['size']} x {matrix['size']}, the best here: "
        f"{matrix['flops_per_s'] / 1e9:.4g} GFLOP/s, {matrix['flops_per_cpu_s'] / 1e9:.4g} by CPU time"
    )
    lines += _rows(train["runners"])
    for name, row in train["runners"].items():
        if "mfu_matrix" not in row:
            continue
        text = (f"  {name}: MFU of that product {row['mfu_matrix']:.1%} (causal {row['mfu_matrix_causal']:.1%}, by CPU "
                f"time {row['mfu_matrix_cpu']:.1%})")  # fmt: skip
        if row["mfu"] is None:
            text += f"; no peak is published for {result['device']}"
        else:
            text += f"; of the stated peak {row['mfu']:.1%} (causal {row['mfu_causal']:.1%}, HFU {row['hfu']:.1%})"
        if "executed_flops" in row:
            text += f"; executes {row['executed_flops']:.4g} FLOPs"
        lines.append(text)
    if "data_wait" in train:
        wait = train["data_wait"]
        seconds, share = wait["step_s"], wait["share"]
        lines.append(f"  fed by the loader: {seconds * 1e3:.1f} ms a step, {share:.1%} of it waiting for data")
    return lines + _does(train["runners"])


def _answers(result: dict) -> list[str]:
    answers = result["answers"]
    lines = [(f"answers to {answers['rows']} questions of {answers['length']} tokens ({answers['real_tokens']} real), "
             f"here in batches of {answers['batch_size']}, {answers['max_new_tokens']} new tokens")]  # fmt: skip
    if "torch_batch_size" in answers:
        lines[0] += f"; HF in batches of {answers['torch_batch_size']}, padded to the longest of each"
    if "torch_generated_tokens" in answers:
        lines[0] += f", {answers['torch_generated_tokens']} new tokens of every row"
    return lines + _rows(answers["runners"]) + _does(answers["runners"])


def _rows(runners: dict) -> list[str]:
    lines = [f"  {'':18}{'ms':>9} {'(least to most)':>20}{'CPU s':>9} {'(least to most)':>18}{'/s':>9}{'/CPU s':>9}"]
    for name, row in runners.items():
        wall, cpu = row["step_s"], row["cpu_s"]
        within = f"({wall['min'] * 1e3:.1f} to {wall['max'] * 1e3:.1f})"
        within_cpu = f"({cpu['min']:.3f} to {cpu['max']:.3f})"
        lines.append(
            f"  {name:18}{wall['median'] * 1e3:9.1f} {within:>20}{cpu['median']:9.3f} {within_cpu:>18}"
            f"{row['samples_per_s']:9.1f}{row['samples_per_cpu_s']:9.2f}"
        )
    return lines


def _does(runners: dict) -> list[str]:
    return [f"  {name}: {DOES[name]}" for name in runners]


def _loader(result: dict) -> list[str]:
    return ["loader, drained:"] + [
        f"  {name:18}{row['batches_per_s']:9.1f} batches/s{row['samples_per_s']:10.0f} rows/s"
        f"{row['bytes_per_s'] / 1e6:9.1f} MB/s{row['cpu_s']['median'] * 1e3:9.2f} CPU ms a batch"
        for name, row in result["loader"].items()
    ]


def _convert(result: dict) -> list[str]:
    figures = result["convert"]
    lines = [f"conversion of {figures['model']}, {_bytes(figures['bytes'])} of float32:"]
    for way, name in (("to_orbax", "HF to Orbax"), ("to_hf", "Orbax to HF")):
        middle, least, most = (figures[way][key] / 1e6 for key in ("median", "min", "max"))
        lines.append(f"  {name:18}{middle:9.1f} MB/s ({least:.1f} to {most:.1f})")
    return lines


def _startup(result: dict) -> list[str]:
    lines = ["start of a process to the end of its first step, seconds:"]
    for name, row in result["startup"].items():
        phases = ", ".join(f"{phase} {at:.1f}" for phase, at in row.items() if phase not in ("first_step", "cpu_s"))
        lines.append(f"  {name:6}{row['first_step']:7.1f} ({phases}); CPU {row['cpu_s']:.1f}")
    return lines


def _ratios(result: dict) -> list[str]:
    lines = ["port over reference in samples, above 1 the port is faster:"]
    for name, ratio in result["ratios"].items():
        main, other = ("CPU-second", "wall") if ratio["by"] == "cpu" else ("second", "cpu")
        beside = ratio[other]
        lines.append(
            f"  {name:22}{ratio['median']:7.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) per {main}; "
            f"by {'wall time' if other == 'wall' else 'CPU time'} {beside['median']:.2f} "
            f"({beside['min']:.2f} to {beside['max']:.2f})"
        )
    return lines


def _bytes(number: int | None) -> str:
    if number is None:
        return "of unknown size"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


# ------------------------------------------------------------------ conclusions of the stages in `cases`

# Stages whose training steps are compared by their samples/s.
OUR_STAGES, THEIR_STAGES = ("train_bf16", "train_fp32"), ("torch", "torch_fp32")


def conclusions(result: dict) -> dict:
    """{"ratios", "lines"} of what the stages of `cases` found; a ratio without both of its sides is not there.

    ratios: ours over theirs in samples/s, above 1 is faster. train_best: the fastest step of each, state in bfloat16;
      train_fp32_best: the same with float32 weights; train_same_batch: at the largest batch that both ran without
      rematerialisation in bfloat16; letters_vs_generate, letters_vs_forward: both of batch 8;
      letters_best_vs_generate: ours at its own best batch.
    """
    lines, ratios = [*origin_lines(result), *machine_lines(result)], {}
    theirs = [row for name in THEIR_STAGES for row in measured(result, name)]
    their_steps = [row for row in theirs if row["what"] in ("torch train", "torch compiled")]
    for dtype, name in (("bfloat16", "train_best"), ("float32", "train_fp32_best")):
        ours = fastest(row for stage in OUR_STAGES for row in measured(result, stage) if row["param_dtype"] == dtype)
        if ours:
            lines.append(f"full fine-tuning, state in {dtype}: {ours['case']}: {rate_text(ours)}")
        other = fastest(row for row in their_steps if row["param_dtype"] == dtype)
        if other:
            lines.append(f"transformers: {other['case']}: {other['samples_per_s']:.2f} samples/s")
        if ours and other:
            ratios[name] = ours["samples_per_s"] / other["samples_per_s"]
    same = [
        (row, other)
        for row in measured(result, "train_bf16")
        for other in their_steps
        if row["remat"] == other["remat"] == "none" and row["batch_size"] == other["batch_size"]
        and row["param_dtype"] == other["param_dtype"] and other["what"] == "torch train"
    ]  # fmt: skip
    if same:
        ours, other = max(same, key=lambda pair: pair[0]["batch_size"])
        ratios["train_same_batch"] = ours["samples_per_s"] / other["samples_per_s"]
    letters = [row for row in measured(result, "letters") if not row["num_new"]]
    best = fastest(letters)
    if best:
        lines.append(f"{best['case']}: {best['samples_per_s']:.1f} samples/s")
    for what in ("generate", "forward"):
        other = fastest(row for row in theirs if row["what"] == f"torch {what}")
        alike = fastest(row for row in letters if other and row["batch_size"] == other["batch_size"])
        if other and alike:
            ratios[f"letters_vs_{what}"] = alike["samples_per_s"] / other["samples_per_s"]
        if other and best:
            ratios[f"letters_best_vs_{what}"] = best["samples_per_s"] / other["samples_per_s"]
    adapters = fastest(measured(result, "lora"))
    if adapters:
        lines.append(f"{adapters['case']}: {rate_text(adapters)}")
    lines += [f"{name}: {value:.2f}" for name, value in ratios.items()]
    lines += plan_lines(result) + result.get("trace", {}).get("limits", []) + stage_lines(result)
    return {"ratios": ratios, "lines": lines}


def origin_lines(result: dict) -> list[str]:
    """When, on what and with which versions the stage `machine` ran; and what figures of a CPU are not."""
    if "machine" not in result or "device" not in result:
        return []
    driver = result["machine"].get("driver")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"measured {result['date']} on {result['num_devices']} x {result['device']}"
        f"{f', driver {driver}' * bool(driver)}: {result['model']}",
        f"versions: {versions}",
    ]
    if result["machine"]["platform"] == "cpu":
        lines.append(
            "a CPU ran every stage by the code of an accelerator: it shows that the stages run, and no figure of a GPU"
        )
    return lines


def stage_lines(result: dict) -> list[str]:
    """Seconds of all stages, and what became of those that are not done."""
    taken = [
        f"{name} {stage['seconds']:.0f}" + (f" of {stage['limit_s']:.0f}" if "limit_s" in stage else "")
        for name, stage in result["stages"].items() if "seconds" in stage
    ]  # fmt: skip
    lines = [f"seconds of the stages: {', '.join(taken)}"] if taken else []
    for name, stage in result["stages"].items():
        if stage["status"] != "done":
            why = stage.get("error") or stage.get("why")
            lines.append(f"{name}: {stage['status']}" + f" ({why})" * bool(why))
    return lines


def measured(result: dict, stage: str) -> list[dict]:
    return [row for row in result.get(stage, {}).get("rows", []) if row.get("samples_per_s")]


def fastest(rows) -> dict | None:
    return max(rows, key=lambda row: row["samples_per_s"], default=None)


def rate_text(row: dict) -> str:
    text = f"{row['samples_per_s']:.2f} samples/s"
    if row.get("mfu_of_measured") is not None:
        text += (f", model FLOPs {row['mfu_of_measured']:.1%} of the measured matrix rate "
                 f"({row['mfu_causal_of_measured']:.1%} with causal attention counted half)")  # fmt: skip
    return text + (f", MFU {row['mfu']:.1%} of the published peak" if row.get("mfu") is not None else "")


def machine_lines(result: dict) -> list[str]:
    machine = result.get("machine", {})
    rate, memory = machine.get("matmul", {}).get("flops_per_s"), machine.get("memory_bytes_per_s")
    lines = [f"bfloat16 products: {rate / 1e12:.1f} TFLOP/s measured"] if rate else []
    return lines + ([f"memory: {memory / 1e12:.2f} TB/s measured"] if memory else [])


def plan_lines(result: dict) -> list[str]:
    """What `plan` says of a step beside what the device did: peak bytes, and seconds by the schedule."""
    lines = []
    for name in (*OUR_STAGES, "lora", "letters"):
        for row in measured(result, name):
            parts = [*filter(None, (peak_text(row), *simulated_texts(row)))]
            if parts:
                lines.append(f"plan beside the device: {row['case']}: {'; '.join(parts)}")
    return lines


def peak_text(row: dict) -> str:
    """The plan's peak, and the device's where this row's program set a new one of its process."""
    plan, peak = row.get("plan_peak_bytes"), row.get("peak_bytes")
    if not plan:
        return ""
    text = f"peak {plan / 2**30:.3g} GiB by the plan"
    if not peak:
        return f"{text}, the device tells none"
    if peak <= (row.get("peak_bytes_before") or 0):
        return f"{text}, the device's is of an earlier case"
    return f"{text}, {peak / 2**30:.3g} the device's ({plan / peak:.3f} of it)"


def simulated_texts(row: dict) -> list[str]:
    """The simulated step beside the measured one, at published peaks and at measured rates; or why there is none."""
    step, texts, reasons = row.get("step_s", {}).get("median"), [], []
    for rates, seconds in row.get("simulated", {}).items():
        if "not_read" in seconds:
            reasons.append(seconds["not_read"].partition(": ")[2])
        elif step:
            by = "published peaks" if rates == "published" else "measured rates"
            texts.append(
                f"step {seconds['step_s'] * 1e3:.4g} ms simulated at {by} (bounds {seconds['overlapped_s'] * 1e3:.4g} and "
                f"{seconds['in_turn_s'] * 1e3:.4g}), {step * 1e3:.4g} measured ({seconds['step_s'] / step:.2f} of it)"
            )
    return texts or [f"no step simulated: {reason}" for reason in dict.fromkeys(reasons)]
