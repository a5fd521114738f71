"""Render docs/performance.md from the JSON of the measurements and remarks.md, which is written by hand."""

from pathlib import Path

from benchmark.instruments import spread
from benchmark.results import read
from fairdiff.files import write_text

INTRO = """# Performance

Written by `scripts/bench.py` from its measurements and `scripts/benchmark/remarks.md`; do not edit. "Reference,
literally" is the published algorithm (Shen et al., ICLR 2024), implemented in
[`scripts/benchmark/literal.py`](../scripts/benchmark/literal.py). It has three sampling passes and a graph over time with
gradient checkpointing. It samples the reference images ("originals") again at every step, and encodes the prompt in every
micro-batch. Its gradient equals ours at K = T with the step weights `reference` to 1e-4 (`tests/test_bench.py`). Variants
alternate in one process; [brackets] contain the smallest and the largest round, after the median. Commands are shown as
they were on the given dates. Since then `decode_batch` and `replay_batch` have become `micro_batch`, and
`prompts.train_limit` was removed.
"""
REMARKS = Path(__file__).parent / "remarks.md"  # conclusions from the numbers, written by hand
COMMANDS = {
    "steps": ("One step", "python scripts/bench.py 'part=[steps]'"),
    "time_to_bias": ("Time to the same bias", "python scripts/bench.py 'part=[time_to_bias]' steps=240"),
    "variance": ("Noise of the gradient", "python scripts/bench.py 'part=[variance]'"),
    "memory": ("Memory", "python scripts/bench.py 'part=[memory]' micro_batch=4 literal_batch=4"),
    "ablation": ("Which gradient learns", "python scripts/bench.py 'part=[ablation]' steps=240"),
    "profile": ("Where the time of a step goes", "python scripts/bench.py 'part=[profile]'"),
    "audit": ("An audit", "python scripts/bench.py 'part=[audit]'"),
    "compile": ("torch.compile and channels_last", "python scripts/bench.py 'part=[compile]'"),
    "throughput": ("Seconds a step on a GPU", "python scripts/bench.py device=cuda model=sd15_random"),
}


def write_page(results: Path, page: Path) -> None:
    """Write the page from every <results>/*/<part>.json, with the parts in the page's order."""
    found = [read(path) for path in sorted(results.glob("*/*.json"))]
    write_text(page, render([f for f in found if f is not None]))


def render(measurements: list[dict]) -> str:
    """Return the page as Markdown. A part without a measurement shows its command."""
    lines = [INTRO, REMARKS.read_text(encoding="utf-8")]
    for part, (title, command) in COMMANDS.items():
        lines.append(f"## {title}\n")
        own = [m for m in measurements if m["part"] == part]
        if not own:
            lines.append(f"Not measured yet: `{command}`\n")
        for m in own:
            lines += [about(m), *SECTIONS[part](m["result"]), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def about(m: dict) -> str:
    """Return the settings and conditions of a measurement as text."""
    s, c = m["settings"], m["conditions"]
    extras = [name for name in ("channels_last", "compile") if s[name]]
    if s["originals"] < 1:
        extras.insert(0, f"ours with originals for {s['originals']:.0%} of the images")
    batches = f"; batches: {s['decode_batch']} decoded, {s['replay_batch']} replayed, {s['literal_batch']} in the reference"
    if m["part"] == "throughput":  # its rows have different batches
        batches = ""
    text = (
        f"**{s['model']}**, {s['adapter']}, B = {s['B']}, T = {s['T']}, guidance {s['guidance']:g}, {s['dtype']}"
        f"{', ' + ', '.join(extras) if extras else ''}{batches}. Measured {c['date']} on {c['device']}, {c['threads']} of "
        f"{c['cores']} cores, load {c['load']:g} at the start, torch {c['torch']}, diffusers {c['diffusers']}."
    )
    return text + ("" if m["complete"] else " **Not finished.**") + f"\n\n`{m['command']}`\n"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with three significant digits and without an exponent, None as a dash."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def interval(values: list[float] | None, unit: str = "") -> str:
    """Format as `median [smallest, largest]`."""
    if values is None:
        return "–"
    middle, low, high = map(number, values)
    return f"{middle}{unit} [{low}, {high}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table with the first column aligned left and the others right."""
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def steps(result: dict) -> list[str]:
    kinds = ["sample", "graph", "recompute", "backward"]
    head = ["variant", *kinds, "U-Net evaluations", "fewer", "seconds", "faster", "peak MiB"]
    rows = [
        [
            r["variant"],
            *(number(r["evaluations"].get(k, 0), 1) for k in kinds),
            number(r["total"], 1),
            f"{r['fewer']:.2f}×",
            interval(r["seconds"]),
            interval(r["faster"], "×"),
            number(r["peak_mib"]),
        ]
        for r in result["rows"]
    ]
    return [
        *table(head, rows),
        "",
        "A U-Net evaluation is one forward or one backward pass of one sample; `sample` is without a graph and includes "
        "originals. With frozen weights a backward pass computes weight gradients for the adapter only (one backward pass "
        f"here has {result['backward_per_forward']:.2f} of a forward pass's operations). There were {result['rounds']} "
        "rounds; `faster` is the ratio within a round. The peak is measured above the memory of the loaded model.",
    ]


def time_to_bias(result: dict) -> list[str]:
    head = ["gradient", "bias ≤", "reached", "steps", "fewer", "seconds", "sooner"]
    rows = [
        [
            r["learner"],
            f"{r['threshold']:g}",
            f"{r['reached']} of {r['seeds']}",
            interval(r["step"]),
            interval(r["step_ratio"], "×"),
            interval(r["seconds"]),
            interval(r["seconds_ratio"], "×"),
        ]
        for r in result["rows"]
    ]
    v = result["watch"]
    return [
        *table(head, rows),
        "",
        f"These runs have {result['steps']} steps. The averaged adapter is validated every {v['every']} steps with the "
        f"training judge, on {v['images']} images of each of {v['prompts']} prompts that are not trained on. Ratios are "
        "paired by seed, to the first gradient of the table. Seconds are those of training steps and sampling of originals.",
        "",
        *ablation(result, "the same runs: validation bias"),
    ]


def ablation(result: dict, title: str = "validation bias") -> list[str]:
    """Return the table of bias over steps: mean over seeds [smallest, largest] at some validations, and total seconds."""
    at = sorted({row["step"] for seeds in result["runs"].values() for h in seeds.values() for row in h})
    at = at[:: max(1, -(-len(at) // 8))] + at[-1:] * (len(at) > 8)
    at = sorted(set(at))
    rows = []
    for name, seeds in result["runs"].items():
        row = [name]
        for step in at:
            values = [r["bias"] for h in seeds.values() for r in h if r["step"] == step]
            mean = sum(values) / max(len(values), 1)
            row.append(f"{mean:.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "–")
        seconds = [h[-1]["seconds"] for h in seeds.values() if "seconds" in h[-1]]
        rows.append([*row, interval(spread(seconds) if seconds else None)])
    return table([f"{title} after step", *map(str, at), "seconds"], rows)


def variance(result: dict) -> list[str]:
    p = result["prompts"]
    ks = sorted({r["K"] for r in result["rows"]})
    cells = {(r["choice"], r["K"]): r for r in result["rows"]}
    names = list(dict.fromkeys(r["choice"] for r in result["rows"]))
    rows = [[n, *(number(cells[n, k]["variance"]) for k in ks)] for n in names]
    bias = [[n, *(_bias(cells[n, k]["bias_over_noise"]) for k in ks)] for n in names]
    sizes = [[number(s["B"]), number(s["variance"])] for s in result["sizes"]]
    return [
        "This table shows the variance that replaying K of T steps adds to the gradient of a batch, relative to |E g|²:",
        "",
        *table([f"choice of steps (T = {result['T']})", *(f"K = {k}" for k in ks)], rows),
        "",
        "`stratified` is ours (systematic, with offsets spread over the batch). `systematic` has a random offset for each "
        "image. `uniform` draws K of T steps for each image, `shared` draws them for the whole batch. The next table shows "
        f"the squared mean error of {result['draws']:,} draws, divided by its expectation for an unbiased estimate, as the "
        f"mean over {result['batches']} batches. Without bias it is 1 on average, and bias increases it. The brackets show "
        "the value that 95 of 100 unbiased estimates stay below:",
        "",
        *table(["choice of steps", *(f"K = {k}" for k in ks)], bias),
        "",
        "The steps contribute, from first to last (root mean square over images, relative to their mean): "
        f"{', '.join(number(n) for n in result['by_step']['norms'])}. Drawing steps in proportion to this, and not evenly, "
        f"would make the second moment {number(result['by_step']['even_over_best'])} times smaller.",
        "",
        f"This is the variance of the full gradient over {result['batches']} batches of one prompt, on the same scale:",
        "",
        *table(["B", "relative variance"], sizes),
        "",
        f"Do prompts agree? These are cosines of full gradients of B = {p['B']} images, for {p['prompts']} prompts: between "
        f"two batches of one prompt {interval(p['own'])}, between two prompts {interval(p['other'])}, {p['opposed']:.0%} of "
        f"them below 0. {p['first']:.0%} of the sum of |g|² over prompts lies in one direction. More images of one prompt "
        "reduce only the noise of images. Several prompts in a step (`prompts.per_step`) also reduce that of prompts.",
    ]


def _bias(found: dict | None) -> str:
    return "–" if found is None else f"{number(found['ratio'])} (< {number(found['limit'])})"


def memory(result: dict) -> list[str]:
    head = ["", "T", "B", "K", "reference MiB", "ours MiB"]
    rows = [
        [
            f"over {r['over']}",
            *(str(r[n]) for n in "TBK"),
            number(r["peak_mib"]["literal"]),
            number(r["peak_mib"]["ours"]),
        ]
        for r in result["rows"]
    ]
    return [*table(head, rows), "", "This is the peak of a step above the memory of the loaded model, with originals cached."]


def profile(result: dict) -> list[str]:
    total = result["seconds"][0]
    rows = [[r["stage"], interval(r["seconds"]), f"{r['seconds'][0] / total:.0%}"] for r in result["rows"]]
    rows.append(["**whole step**", interval(result["seconds"]), ""])
    return [
        *table(["stage", "seconds", "share"], rows),
        "",
        f"This is ours with K = {result['K']} and originals cached. No time is counted twice.",
    ]


def throughput(result: dict) -> list[str]:
    head = ["originals", "micro-batch", "seconds a step", "peak GiB", "TFLOP", "TFLOP/s", "of peak"]
    rows = [
        [
            r["originals"],
            str(r["micro_batch"]),
            interval(r["seconds"]),
            number(r["peak_gib"]),
            number(r["tflop"]),
            number(r["tflops"]),
            "–" if r["share"] is None else f"{r['share']:.1%}",
        ]
        for r in result["rows"]
    ]
    what = (
        "all memory that torch holds on the device, weights included"
        if result["whole_process"]
        else "above the memory of the loaded model"
    )
    return [*table(head, rows), "", f"K = {result['K']}. Peak: {what}. Operations are counted by torch's flop counter."]


def audit(result: dict) -> list[str]:
    rows = [
        [r["contestant"], interval(r["images_per_second"]), interval(r["faster"], "×"), number(r["apart"])]
        for r in result["rows"]
    ]
    lines = [
        *table(["images of the same prompt and noise", "images a second", "faster", "largest difference"], rows),
        "",
        f"All have {result['T']} sampler steps and batches of B. The pipeline returns tensors, not PIL images. Ours uses "
        f"{result['dtype']}, unless it has the pipeline's precision. The difference is that of pixels in [0, 1].",
    ]
    if i := result["intervals"]:
        lines[-1] += (
            f" Computing all numbers of audit.json for {', '.join(i['attributes'])}, from {i['prompts']} prompts × "
            f"{i['images']} images before and after, takes {number(i['seconds'])} seconds."
        )
    return lines


def compiled(result: dict) -> list[str]:
    rows = [
        [
            f"{r['forward']}, {r['variant']}",
            interval(r["seconds"]),
            interval(r["faster"], "×"),
            number(r["compilation"]),
            number(r["apart"]),
        ]
        for r in result["rows"]
    ]
    return [
        *table(["forward of B images", "seconds", "faster", "seconds of compilation", "largest difference"], rows),
        "",
        f"Frozen networks without an adapter and without a graph. Sampling: {result['T']} steps of the U-Net, the solver's "
        "work included; its transformer blocks are compiled. Decoding: the VAE; its residual blocks are compiled. "
        f"{result['rounds']} rounds; `faster` is the ratio within a round. Compilation: what a round before them took more, "
        "without torch's caches on disk. Difference: to what runs today, of latents and of pixels in [0, 1].",
    ]


SECTIONS = {
    "steps": steps,
    "time_to_bias": time_to_bias,
    "variance": variance,
    "memory": memory,
    "ablation": ablation,
    "profile": profile,
    "audit": audit,
    "compile": compiled,
    "throughput": throughput,
}
