"""`eval.md`: the tables of `eval.json` for people, with intervals; every text of a user is escaped."""

from typing import Any

from ..formatting import interval, number, p_value
from ..hub import md_escape
from ..hub.tables import differences_table, judge_table, table


def page(evaluation: dict[str, Any]) -> str:
    """What `eval.json` holds, as one page of Markdown without HTML or syntax from prompts, labels or names."""
    protocol = evaluation["protocol"]
    sections = ["# Evaluation", _introduction(protocol, evaluation), "## Scores", _scores(evaluation)]
    if any(entry["value"] is not None for entry in evaluation.get("gap_closures") or ()):
        sections += ["## Gap closure", _gaps(evaluation)]
    if evaluation["paired"]:
        sections += ["## Differences on the same prompts and noise", _differences(evaluation)]
    metrics = judge_table(evaluation)
    if metrics:
        sections += ["## Pictures", metrics]
    if evaluation["methods"] and max(entry["runs"] for entry in evaluation["methods"]) > 1:
        sections += ["## Methods over training runs", _methods(evaluation)]
    if evaluation["exploratory"]:
        sections += ["## By category and challenge", f"*{evaluation['exploratory']['note']}*", _groups(evaluation)]
    sections += ["## Protocol", _protocol(evaluation)]
    return "\n\n".join(sections) + "\n"


def _introduction(protocol: dict[str, Any], evaluation: dict[str, Any]) -> str:
    names = [f"{md_escape(adapter['label'])} ({md_escape(adapter['source'])})" for adapter in evaluation["adapters"]]
    model = f"Model {md_escape(protocol['model'])}" if protocol.get("model") else "The model in training"
    with_adapters = f" with the adapters {', '.join(names)}" if names else ""
    return (
        f"{model}{with_adapters} on {protocol['prompts']} prompts, {protocol['images_per_prompt']} image(s) each. "
        "Intervals are 95 % bootstrap intervals over prompts."
    )


def _scores(evaluation: dict[str, Any]) -> str:
    kind = {True: " (optimised)", False: " (held out)", None: ""}
    rewards = evaluation["rewards"]
    header = ["model", "steps", "images drawn", *(md_escape(n) + kind[r["optimised"]] for n, r in rewards.items())]
    rows = []
    for row in evaluation["rows"]:
        found = [row["rewards"][name] for name in rewards]
        cells = [number(one["mean"]) + interval(one["ci_low"], one["ci_high"]) for one in found]
        rows.append([md_escape(row["name"]), str(row["num_inference_steps"]), str(row["images_drawn"]), *cells])
    return table(header, rows)


def _gaps(evaluation: dict[str, Any]) -> str:
    rows = [
        [
            f"{md_escape(e['row'])} from {md_escape(e['base'])} to {md_escape(e['target'])}",
            md_escape(e["reward"]),
            number(e["value"]) + interval(e["ci_low"], e["ci_high"]),
        ]
        for e in evaluation["gap_closures"]
        if e["value"] is not None
    ]
    return table(["model", "reward", "share of the gap closed"], rows, right=2)


def _differences(evaluation: dict[str, Any]) -> str:
    header, rule, *lines = differences_table(evaluation).split("\n")
    lines = [
        f"{line} {p_value(entry['wilcoxon_p'])} | {p_value(entry['holm_p'])} | {_verdict(entry)} |"
        for line, entry in zip(lines, evaluation["paired"], strict=True)
    ]
    return "\n".join([f"{header} Wilcoxon p | Holm p | verdict |", f"{rule} ---: | ---: | :--- |", *lines])


def _verdict(entry: dict[str, Any]) -> str:
    """Higher or lower where interval and test say so; otherwise which of them does not."""
    reasons = {
        "no interval": "unclear: no interval",
        "interval": "unclear: the interval holds zero",
        "test": "unclear: the test does not agree with the interval",
        "both": "no difference found",
        None: entry["verdict"],
    }
    return reasons[entry["weaker"]]


def _methods(evaluation: dict[str, Any]) -> str:
    rows = [
        [
            f"{md_escape(e['method'])} against {md_escape(e['against'])}, {e['num_inference_steps']} step(s)",
            md_escape(e["reward"]),
            str(e["runs"]),
            number(e["delta"], sign=True) + interval(e["ci_low"], e["ci_high"]),
            ", ".join(number(delta, sign=True) for delta in e["deltas"]),
        ]
        for e in evaluation["methods"]
    ]
    return table(["comparison", "reward", "runs", "difference", "each run"], rows, right=2)


def _groups(evaluation: dict[str, Any]) -> str:
    rows = [
        [
            f"{md_escape(e['by'])}: {md_escape(e['value'])}",
            f"{md_escape(e['row'])} against {md_escape(e['against'])}",
            md_escape(e["reward"]),
            str(e["prompts"]),
            number(e["delta"], sign=True) + interval(e["ci_low"], e["ci_high"]),
        ]
        for e in evaluation["exploratory"]["entries"]
    ]
    return table(["prompts", "comparison", "reward", "number", "difference"], rows, right=3)


def _protocol(evaluation: dict[str, Any]) -> str:
    protocol = evaluation["protocol"]
    lines = [
        f"- seeds of the noise {', '.join(map(str, protocol['seeds']))}; {protocol['resamples']} bootstrap resamples",
        f"- prompts: {md_escape(protocol['prompts_source'] or 'a list')}, sha256 {protocol['prompts_sha256'][:16]}",
        f"- pipeline: {md_escape(protocol['pipeline'])}",
        "- p-values: Wilcoxon's signed-rank test over prompts; Holm's correction over the rows under one reward",
    ]
    if protocol.get("images_drawn"):
        lines.append(f"- images drawn in all: {protocol['images_drawn']}")
    for row, counts in (protocol.get("odd_pictures") or {}).items():
        found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines.append(f"- **odd pictures** of {md_escape(row)}: {found} (not made of numbers or flagged; all black)")
    check = evaluation["checks"].get("scale_zero_equals_base")
    if check:
        lines.append(f"- at LoRA scale 0 the scores differ from the base's by at most {check['max_score_difference']}")
    if protocol.get("command"):
        lines.append(f"- command: {md_escape(protocol['command'], 2000)}")
    return "\n".join(lines)
