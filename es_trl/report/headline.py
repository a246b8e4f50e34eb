"""The first words of a page: what training gained under what it was trained on, and what it cost; nothing more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import MIN_PROMPTS
from ..formatting import NBSP
from . import wording
from .folder import Folder
from .tables import method_lines, row_labels, ruler
from .wording import count, interval, number, percent, range_of, signed, whole


MAX_GAPS = 8
MIN_GAP = 15.0  # per cent of the ruler: below, the labels of its two ends would lie on each other
ROLES = {
    None: "",
    "trained": "the reward it was trained on",
    "held out": "which training never saw",
    "measured": "which was only measured",
}
ENOUGH = (
    f"Below {MIN_PROMPTS} prompts an interval covers far less than it says, so this page makes no claim; scores and "
    "pictures are below."
)


@dataclass
class Claim:
    """
    What is said of one measure, a reward or the weighted sum that was trained: its name, the role that goes behind the
    name in a sentence, its `paired` differences to the base, one per adapter (`delta`, `ci_low`, `ci_high`,
    `win_rate`, `prompts`), whether it `rises` with more sampling steps, and whether it was `minimised`.
    """

    name: str
    role: str
    paired: list[dict[str, Any]]
    rises: bool = False
    minimised: bool = False

    @property
    def known(self) -> bool:
        """Whether every difference has an interval."""
        return bool(self.paired) and all(entry.get("ci_low") is not None for entry in self.paired)

    @property
    def gained(self) -> bool:
        return self.known and all(entry["ci_low"] > 0 for entry in self.paired)

    @property
    def lost(self) -> bool:
        """Whether it surely moved the wrong way."""
        return self.known and any(
            entry["ci_low"] > 0 if self.minimised else entry["ci_high"] < 0 for entry in self.paired
        )

    @property
    def verb(self) -> str:
        """How that is said."""
        return "rose" if self.minimised else "fell"


def headline(folder: Folder) -> dict[str, Any]:
    """Title, first sentences and gap closures of a run or an evaluation."""
    found: dict[str, Any] = {"title": "A run without an evaluation", "lede": [], "gaps": []}
    evaluation = folder.evaluation
    model, base = wording.main_rows(evaluation)
    if model is None or base is None:
        return found
    rewards = wording.ordered_rewards(evaluation, folder.trained)
    gaps = [gap for reward in rewards for gap in wording.gaps_of(evaluation, reward)]
    subject, others = claims(folder)
    if not subject.paired:
        return found
    found["title"] = title(subject, others, gaps)
    found["lede"] = lede(subject, others, gaps, folder.trained)
    judge = _judge(subject, gaps)
    for entry in method_lines(folder):
        if (entry["reward"], entry["against"]) == (judge, base["name"]) and (entry["runs"] or 0) > 1:
            found["lede"].append(wording.over_seeds(entry))
    return found | _gap_figure(folder, gaps)


def claims(folder: Folder) -> tuple[Claim, list[Claim]]:
    """What was trained (the weighted sum of several rewards, or the one), and every reward beside it."""
    evaluation, trained = folder.evaluation, folder.trained
    about = evaluation.get("rewards") or {}
    rows = wording.adapter_rows(evaluation)
    base = (wording.main_rows(evaluation)[1] or {}).get("name", "")

    def claim(reward: str) -> Claim:
        found = [wording.paired_entry(evaluation, row, base, reward) for row in rows]
        role = ROLES[wording.role(evaluation, trained, reward)]
        rises = bool((about.get(reward) or {}).get("rises_with_steps", bool(wording.gaps_of(evaluation, reward))))
        entries = [entry for entry in found if entry and entry.get("delta") is not None]
        return Claim(reward, role, entries, rises, minimised=(weight_of.get(reward) or 0) < 0)

    rewards = wording.ordered_rewards(evaluation, trained)
    objective = evaluation.get("objective") or {}
    weight_of = objective.get("weights") or {}
    if objective:
        weights = wording.weighted(weight_of)
        entries = [entry for entry in objective["paired"] if entry["row"] in rows and entry["delta"] is not None]
        return Claim("what was trained", weights, entries), [claim(reward) for reward in rewards]
    first = next((reward for reward in rewards if reward in trained), rewards[0])
    return claim(first), [claim(reward) for reward in rewards if reward != first]


def title(subject: Claim, others: Sequence[Claim], gaps: Sequence[dict[str, Any]]) -> str:
    """The result in a few words, never more than its intervals allow."""
    if not subject.known:
        return "Too few prompts to tell" if _few(subject) else "No clear gain"
    lost = [claim for claim in others if claim.lost]
    judge = _judge(subject, gaps)
    if judge is not None and not lost and not subject.lost:
        # Of several training seeds the least convincing one has the word.
        return _gap_title(min((gap for gap in gaps if gap["reward"] == judge), key=lambda gap: gap["low"]))
    if subject.gained and lost:
        name = "The trained sum" if subject.name == "what was trained" else subject.name
        return f"{name} rose, {lost[0].name} {lost[0].verb}"
    if subject.gained:
        return f"Better on {range_of([entry['win_rate'] for entry in subject.paired], percent)} of the prompts"
    return "Training made the scores worse" if subject.lost else "No clear gain"


def lede(subject: Claim, others: Sequence[Claim], gaps: Sequence[dict[str, Any]], trained: Sequence[str]) -> list[str]:
    """The sentences under the title: who judged, how often and by how much, how sure, and what fell."""
    if not subject.known and _few(subject):
        few = min(entry["prompts"] for entry in subject.paired)
        return [f"{few} prompt{' was' if few == 1 else 's were'} compared. {ENOUGH}"]
    judge = _judge(subject, gaps)
    spoken = subject if judge is None else next((c for c in [subject, *others] if c.name == judge), subject)
    lost = [claim for claim in others if claim.lost and claim is not spoken]
    sentences = [_gain(spoken)]
    sentences += [f"But {_fall(claim)}." for claim in lost[:3]]
    mine = [gap for gap in gaps if gap["reward"] == judge]
    if mine and not lost:
        sentences.append(_share(mine))
    if judge is not None and subject is not spoken and not subject.gained:
        sentences.append(f"{_with_role(subject)} changed by {_amount(subject.paired)}.")
    return sentences


def _few(claim: Claim) -> bool:
    return min(entry["prompts"] for entry in claim.paired) < MIN_PROMPTS


def _judge(subject: Claim, gaps: Sequence[dict[str, Any]]) -> str | None:
    """The reward whose gap closure is the headline, held-out ones first; `None` where steps are no yardstick."""
    return gaps[0]["reward"] if gaps and subject.rises else None


def _gap_title(gap: dict[str, Any]) -> str:
    base, target = count(gap["base_steps"]), count(gap["target_steps"])
    one = gap["base_steps"] == 1
    noun = "step" if one else "steps"
    if gap["low"] > 1:
        return f"{base.capitalize()} {noun} now {'outscores' if one else 'outscore'} {target}"
    if gap["low"] > 0 and gap["high"] >= 1:
        return f"{base.capitalize()} {noun} now {'scores' if one else 'score'} like {target}"
    if gap["low"] > 0:
        return f"{percent(gap['value'])} of the way from {base} {noun} to {target}"
    return "Training made the scores worse" if gap["high"] < 0 else "No clear gain"


def _gain(claim: Claim) -> str:
    entries = claim.paired
    who = "the trained model scores" if len(entries) == 1 else f"each of the {len(entries)} trained models scores"
    wins = range_of([entry["win_rate"] for entry in entries], percent)
    judge = claim.name + (f", {claim.role}" if claim.role else "")
    text = f"Judged by {judge}, {who} higher than the base model on {wins} of {whole(entries[0]['prompts'])} prompts, "
    return f"{text}drawn from the same noise: {_amount(entries)} on average."


def _fall(claim: Claim) -> str:
    entries = claim.paired
    if not claim.minimised:
        entries = [{"delta": -e["delta"], "ci_low": -e["ci_high"], "ci_high": -e["ci_low"]} for e in entries]
    return f"{_with_role(claim)} {claim.verb} by {_amount(entries, number)}"


def _with_role(claim: Claim) -> str:
    return claim.name + (f", {claim.role}," if claim.role else "")


def _amount(entries: Sequence[dict[str, Any]], show: Callable[[float], str] = signed) -> str:
    change = range_of([entry["delta"] for entry in entries], show)
    ends = interval(entries[0].get("ci_low"), entries[0].get("ci_high"), show) if len(entries) == 1 else ""
    return f"{change} (95{NBSP}% interval {ends})" if ends else change


def _share(gaps: Sequence[dict[str, Any]]) -> str:
    extra, values = gaps[0]["target_steps"] - gaps[0]["base_steps"], [gap["value"] for gap in gaps]
    more = f"{count(extra)} more step{'' if extra == 1 else 's'}"
    change = "gain" if min(values) >= 0 else "change"
    found = f"The {change} is {range_of(values, percent)} of what {more} would give the base model"
    if len(gaps) == 1:
        found += f" (95{NBSP}% interval {interval(gaps[0]['low'], gaps[0]['high'], percent)})"
    return f"{found}."


def _gap_figure(folder: Folder, gaps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Only of what rose or may have: a loss closes no gap. Nothing where the gap is a hair beside the change."""
    gaps = [gap for gap in gaps if gap["high"] > 0]
    scale = ruler([v for gap in gaps for v in (0.0, 1.0, gap["value"], gap["low"], gap["high"])])
    zero, one = scale(0.0)["at"], scale(1.0)["at"]
    if not gaps or one - zero < MIN_GAP:
        return {}
    labels, several = row_labels(folder.evaluation), len({gap["row"] for gap in gaps}) > 1
    trained = folder.trained
    shown = [
        {**gap, **scale(gap["value"], gap["low"], gap["high"]), "label": labels[gap["row"]] if several else None,
         "held_out": None if not trained else gap["reward"] not in trained}
        for gap in gaps[:MAX_GAPS]
    ]  # fmt: skip
    return {"gaps": shown, "zero": zero, "one": one}
