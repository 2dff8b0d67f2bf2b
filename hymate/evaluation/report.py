"""What a search reports: results.json in sentences and tables, as report.md, as a model card and on the console.

`found` is the content of results.json, `part` what it holds of one task: `metrics.scores` and `decisions.assess` of the
held-out split, and as "boosting" what `Boosted.compared` gives, or why it was left out. Where the model is the mean of
a network and plain models, "network" has the network's own scores, and "plain" those of boosting and logistic
regression, where both take part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hymate.data.details import Details
from hymate.evaluation import alarms, in_time, tables
from hymate.evaluation.decisions import ENOUGH_POSITIVES, ENOUGH_SUBJECTS, FEWEST_SUBJECTS
from hymate.evaluation.metrics import AREAS, SHOWN
from hymate.evaluation.results import OTHERS, RESULTS, parts_of
from hymate.evaluation.tables import markdown, number, percent, percent_with_interval, with_interval
from hymate.inference.provenance import SENTENCES
from hymate.storage.paths import Location

REPORT = "report.md"
TUNED = "chosen on the tuning split"  # thresholds
RECALIBRATED = ", after its logits were recalibrated on the tuning split. So were gradient boosting's:"
VERDICT_AIM = 0.9  # the specificity of the operating point in the verdict
GROUPS_A_KIND = 8  # shown, the largest; results.json has all
NAMED = 3  # groups that the verdict names of each kind of trouble
DAYS = """\
How long it lasts, in days. "Of the median" is the error of the best constant, which a useful model must beat;
concordance is the chance that of two durations the longer one is predicted to be longer."""
WEIGHTED = (
    "labels count by their weights, {lowest:.2f} to {highest:.2f}, in training and in every score here; a tool without "
    "weights gives other scores for the same predictions"
)
MEANING = {
    "triggers": "times at which the task's trigger occurs",
    "excluded": "a window's condition does not hold there, or nothing is left to predict",
    "died_before": "death at or before the prediction time: not at risk, no label",
    "competing_deaths": "death inside the label window without the event: {rule}",
    "censored": "the record ends inside the label window, without a death there: no label{censoring}",
    "positives_unseen": "with the event, and the record ends inside the label window: {unseen}",
    "transfers": "labels of a stay that goes on elsewhere within 6 hours, where what follows does not count",
    "labels": "labels",
    "positives": "positive labels",
    "subjects": "subjects with a label",
}
CENSORING = {
    "exclude": (", with the event or without", "no label"),
    "exclude_negatives": (", where the event was not seen", "a positive label, so positives are too frequent"),
    "weights": (
        ", where the event was not seen",
        "a positive label; each label weighs one over its probability of being seen, in all scores here but not in "
        "other tools",
    ),
}
COMPETING = {"negative": "a negative label", "exclude": "no label"}
LIMITS = """\
Not a medical device. The model knows the codes, units and practices of the dataset it was trained on. On another
site's data validate it before any use: `python -m hymate.evaluate` reports how it does there, and what differs."""


def show(found: Mapping[str, Any], run_path: Location) -> None:
    """Print the trials and the scores, and where everything is."""
    tables.show("Trials (scores on the tuning split)", _trial_rows(found))
    for part in parts_of(found):
        tables.show(_title(part), in_time.horizon_rows(part) if in_time.is_in_time(part) else score_rows(part))
    if len(days := _day_rows(found)) > 1:
        tables.show("Predicted days", days)
    for note in _notes(found):
        print(f"Note: {note}")
    for name, place in (
        ("results", run_path / RESULTS),
        ("report", run_path / REPORT),
        ("predictions", run_path / ("predictions" if "tasks" in found else "predictions.parquet")),
        ("bundle", found["bundle"]),
        ("curves", f"tensorboard --logdir {run_path / 'tb'}"),
    ):
        print(f"{name:<12} {place}", flush=True)


def report(found: Mapping[str, Any]) -> str:
    """report.md: the verdict, a picture of each task where there is one, and what is behind them."""
    alt = "ROC, precision-recall, calibration, decision curve"
    alts = ((in_time.PICTURE_ALT if in_time.is_in_time(part) else alt, part) for part in parts_of(found))
    drawn = [f"![{alt}]({part['picture']})" for alt, part in alts if part["picture"]]
    drawn += [f"![{alarms.PICTURE_ALT}]({part['alarms_picture']})" for part in parts_of(found) if "alarms" in part]
    return "\n\n".join([f"# {_title(found)}", *_verdicts(found), *drawn, *_details(found)]) + "\n"


def card(found: Mapping[str, Any]) -> str:
    """The bundle's model card."""
    return "\n\n".join([*_verdicts(found), *_details(found)]) + "\n"


def _verdicts(found: Mapping[str, Any]) -> list[str]:
    parts = [f"**Note:** {note}." for note in _notes(found)]
    for part in parts_of(found):
        if part["split"] == "held_out":
            of_kind = in_time.verdict if in_time.is_in_time(part) else verdict
            parts += [*_task_column(found, f"**{part['task']}**"), of_kind(part)]
    return parts


def _details(found: Mapping[str, Any]) -> list[str]:
    """Markdown parts; how the numbers came about, and tables."""
    days, held_out = _day_rows(found), any(part["split"] == "held_out" for part in parts_of(found))
    scored = "The held-out split was scored once by this search," if held_out else "The tuning split was scored"
    recalibrated = _recalibration_rows(found)
    parts = [
        "## Scores",
        "Intervals are 95 %. Those of proportions are Wilson's, over patients (Kish's effective number, where patients "
        f"have unequal numbers of labels); the others resample patients. {scored} by the checkpoint that "
        f"was best on the tuning split ({_criterion(found)}){'.' if len(recalibrated) == 1 else RECALIBRATED}",
        *([markdown(recalibrated)] if len(recalibrated) > 1 else []),
        *([in_time.AS_LEARNED] if any(map(in_time.is_in_time, parts_of(found))) else []),
        markdown(score_rows(found)),
    ]
    parts += [_compared_on(part) for part in parts_of(found) if "compared_on" in part]
    if found["initial_weights"] == "same split":
        parts.append(f"Here {SENTENCES['same split']}.")
    if len(days) > 1:
        parts += [DAYS, markdown(days)]
    for part in parts_of(found):
        if part["split"] == "held_out":
            of_kind = in_time.sections if in_time.is_in_time(part) else sections
            parts += [*_task_column(found, f"# {part['task']}"), *of_kind(part)]
    parts += ["## Labels", markdown(_split_rows(found))]
    for part in parts_of(found):
        if "triggers" in part["labels"]:
            of_task = f" of {part['task']}" if "tasks" in found else ""
            rule, (censoring, unseen) = COMPETING[part["competing_rule"]], CENSORING[part["censoring_rule"]]
            rows = [["count", "what"]]
            rows += [
                [str(part["labels"][k]), text.format(rule=rule, censoring=censoring, unseen=unseen)]
                for k, text in (in_time.MEANING if in_time.is_in_time(part) else MEANING).items()
                if k in part["labels"]
            ]
            parts += [f"How the labels{of_task} came about, in all splits:", markdown(rows)]
            if part.get("label_details"):
                parts += _label_details(Details(**part["label_details"]))
    if found.get("read_apart"):
        parts.append(f"How they are read: {found['read_apart']}.")
    if found.get("known"):
        moved = "\n".join(f"- {sentence}" for sentence in found["known"])
        parts += [f"Some events became known later than their stamp. Histories hold them at that time:\n\n{moved}"]
    parts += ["## Trials", markdown(_trial_rows(found))]
    failed = [t for t in found["trials"] if t["error"]]
    parts += [f"- trial {t['index']} failed: {t['error']}" for t in failed]
    return [*parts, "## Limits", LIMITS]


def _title(found: Mapping[str, Any]) -> str:
    parts = parts_of(found)
    splits = " or ".join(sorted({part["split"] for part in parts}))
    return f"Task{'s' * (len(parts) > 1)} {', '.join(part['task'] for part in parts)}: risk model on the {splits} split"


def _notes(found: Mapping[str, Any]) -> list[str]:
    """Sentences that a reader of the scores must know."""
    initial = found.get("initial_weights", "new")  # older results have none
    sentences = [] if initial in ("new", "same split") else [SENTENCES[initial]]
    for part in parts_of(found):
        of_part = [part["note"]] if "note" in part else []
        if "weights" in part:
            of_part.append(WEIGHTED.format(**part["weights"]))
        sentences += [": ".join([*_task_column(found, part["task"]), sentence]) for sentence in of_part]
    return sentences


def _compared_on(part: Mapping[str, Any]) -> str:
    sample = part["compared_on"]
    errors = " and ".join(f"{error:.3f} in {name.upper()}" for name, error in sample["standard_error"].items())
    return (
        f"Trials were compared on {sample['labels']:,} of the {sample['of']:,} tuning labels of {part['task']}, each "
        f"weighed by how many it stands for (`train.eval_labels`). The standard error from this is {errors}."
    )


def _criterion(found: Mapping[str, Any]) -> str:
    parts = parts_of(found)
    scores = "AUROC, AUPRC and, for days, concordance" if any("days" in part for part in parts) else "AUROC and AUPRC"
    if any(map(in_time.is_in_time, parts)):
        scores = "the AUROC by each horizon" if len(parts) == 1 else f"{scores}, in time of the AUROC by each horizon"
    metric = f"mean of {scores}" if found["metric"] == "mean" else found["metric"].upper()
    return f"{metric}, averaged over the tasks" if len(parts) > 1 else metric


def _label_details(details: Details) -> list[str]:
    """Sentences on what the definition's windows and predicates found."""
    sentences = [f"Excluded by window: {_counted(details.excluded)}."] if any(details.excluded.values()) else []
    if details.kinds:
        sentences.append(f"First events in the label window by kind, also where left out: {_counted(details.kinds)}.")
    sentences.append(f"Events that each predicate matches: {_counted(details.predicates)}.")
    if any(details.deaths.values()):
        sentences.append(f"Deaths with a date and no time, by where they count: {_counted(details.deaths)}.")
    if without := {name: why for name, why in details.unmatched().items() if name not in details.kinds}:
        named = ", ".join(f"{name} ({why})" if why else name for name, why in without.items())
        sentences.append(f"**No event matches {named}: check the codes.**")
    return sentences


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if not name.startswith("_"))


# ------------------------------------------------------------------------------------------------------ verdict


def verdict(part: Mapping[str, Any]) -> str:
    """How good a task's model is, whether boosting would do, for whom and where the model is wrong, in a few sentences
    (Markdown).
    """
    if part["auroc"]["value"] is None:
        return "The held-out labels are all of one class, so the model can't be judged."
    sentences = {
        "How good.": _ranking(part),
        **({"A mean.": _mean(part)} if "network" in part else {}),
        **({"Would gradient boosting do?": _boosting(part)} if part.get("boosting") else {}),
        "Probabilities.": _probabilities(part),
        "Alerts.": _alerts(part),
        "Worth.": _worth(part),
        **({"As an alarm.": alarms.verdict(part["alarms"], TUNED)} if "alarms" in part else {}),
        "For whom.": _groups(part),
    }
    return "\n".join(f"- **{name}** {text}" for name, text in sentences.items())


def _ranking(part: Mapping[str, Any]) -> str:
    held_out = "held-out " if part.get("split", "held_out") == "held_out" else ""
    return (
        f"Of {part['num_labels']:,} {held_out}predictions for {part['num_subjects']:,} patients "
        f"{part['num_positives']:,} are positive ({percent(part['prevalence'])}). AUROC is "
        f"{with_interval(part['auroc'])}: the chance that a positive is ranked above a negative; guessing gives 0.5. "
        f"AUPRC is {with_interval(part['auprc'])}; guessing gives {number(part['prevalence'])}."
    )


def _mean(part: Mapping[str, Any]) -> str:
    difference, beside = part["network"]["difference"], "gradient boosting"
    if "plain" in part:
        fraction = part["plain"]["linear_fraction"]
        beside = f"plain models: boosting ({percent(1 - fraction)}) and logistic regression ({percent(fraction)})"
    return (
        f"The model is the mean of the network that the search found and of {beside}. The mean minus the network "
        f"alone: AUROC {with_interval(difference['auroc'])}, AUPRC {with_interval(difference['auprc'])} (95 % for both "
        "intervals together)."
    )


def _boosting(part: Mapping[str, Any]) -> str:
    boosting = part["boosting"]
    if "left_out" in boosting:
        return f"Not compared: {boosting['left_out']}. `python -m hymate.baselines` fits it on the same labels."
    difference = boosting["difference"]
    ahead = [name.upper() for name in AREAS if (difference[name]["ci"] or [0])[0] > 0]
    behind = [name.upper() for name in AREAS if (difference[name]["ci"] or [0])[-1] < 0]
    if ahead and behind:
        answer = f"It depends: this model is ahead in {ahead[0]} and behind in {behind[0]}."
    elif ahead:
        answer = f"Not as well: this model is ahead in {' and '.join(ahead)}."
    elif behind:
        answer = (
            f"Yes, even better: this model is behind in {' and '.join(behind)}, so rank these patients by boosting."
        )
    elif "note" in part:
        answer = "Unclear: no difference can be shown, and with so few patients only a large one could be."
    else:
        answer = "Yes, as far as these patients show: no difference can be shown, and boosting is simpler."
    ahead_by = part.get("alarms", {}).get("gradient boosting", {}).get("difference")
    if ahead_by and ahead_by["ci"] and (ahead_by["ci"][0] > 0 or ahead_by["ci"][1] < 0):
        answer = f"For ranking: {answer} For alarms: this model is {'ahead' if ahead_by['value'] > 0 else 'behind'}."
    of_all, fitted_to = part["splits"]["train"]["labels"], boosting["num_fitted"]
    sample = f" (a sample of {fitted_to:,} of {of_all:,}, for want of memory)" if fitted_to < of_all else ""
    library = f" ({boosting['library']})" if "library" in boosting else ""  # older results hold no name
    return (
        f"{answer} On {boosting['num_features']:,} aggregate features of the same histories and labels{sample}, in "
        f"{boosting['seconds']:.1f} s, boosting{library} reaches AUROC {with_interval(boosting['auroc'])} and AUPRC "
        f"{with_interval(boosting['auprc'])} on the same held-out predictions. This model minus boosting: AUROC "
        f"{with_interval(difference['auroc'])}, AUPRC {with_interval(difference['auprc'])} (95 % for "
        "both intervals together)." + (" Predicted days were not compared." if "days" in part else "")
    )


def _probabilities(part: Mapping[str, Any]) -> str:
    calibration = part["calibration"]
    return (
        f"The mean predicted risk is {percent(calibration['predicted'])}, the observed one "
        f"{percent_with_interval(calibration['observed'])}. The expected calibration error is "
        f"{number(calibration['ece'])}; by chance alone a perfect model would have {number(calibration['by_chance'])} "
        f"with as many labels, so {number(calibration['beyond_chance'])} remains. The calibration slope is "
        f"{with_interval(calibration['slope'])} (1 is ideal; below 1, risks are too extreme)."
    )


def _alerts(part: Mapping[str, Any]) -> str:
    point = next(point for point in part["operating_points"] if point["aim"] == VERDICT_AIM)
    return (
        f"At a threshold of {percent(point['threshold'])}, for {percent(VERDICT_AIM)} specificity "
        f"({part.get('thresholds', TUNED)}), {point['alerts_per_100']:.0f} of 100 predictions are alerts. They find "
        f"{percent_with_interval(point['sensitivity'])} of the positives (sensitivity), and "
        f"{percent_with_interval(point['ppv'])} of them are right (PPV). Specificity is "
        f"{percent_with_interval(point['specificity'])}."
    )


def _worth(part: Mapping[str, Any]) -> str:
    if part["useful"] is None:
        return "Around the prevalence, net benefit does not detectably exceed treat-all and treat-none."
    low, high = map(percent, part["useful"])
    thresholds = f"at a threshold of {low}" if low == high else f"at thresholds from {low} to {high}"
    return f"Net benefit exceeds treat-all and treat-none {thresholds}."


def _groups(part: Mapping[str, Any]) -> str:
    groups = [group for group in part["subgroups"] if not group["hidden"]]
    if not groups:
        return f"There are no groups of {FEWEST_SUBJECTS} patients: neither ages nor sexes are recorded."
    texts = []
    for wrong in ("too high", "too low"):
        off = [group for group in groups if group["wrong"] == wrong]
        off = sorted(off, key=lambda group: -abs(group["predicted"] - group["observed"]["value"]))[:NAMED]
        names = "; ".join(
            f"{_name(g)} ({percent(g['predicted'])} predicted, {percent_with_interval(g['observed'])} observed)"
            for g in off
        )
        texts += [f"On average {wrong} for {names}."] if off else []
    worse = sorted((g for g in groups if g["ranked_worse"]), key=lambda g: g["auroc"]["value"])[:NAMED]
    if worse:
        names = "; ".join(f"{_name(group)} (AUROC {with_interval(group['auroc'])})" for group in worse)
        texts.append(f"Ranks worse for {names}.")
    small = sum(not group["judged"] for group in groups)
    if not texts and small == len(groups):
        return f"All {small} groups are too small to judge."
    if not texts:
        judged = len(groups) - small
        texts.append(f"In none of {judged} groups are risks detectably wrong on average, or ranked worse than overall.")
    if small:
        texts.append(f"{small} of {len(groups)} groups are too small to judge.")
    return " ".join(texts)


def _name(group: Mapping[str, Any]) -> str:
    """Codes name themselves; ages and what is not recorded need their kind."""
    code = group["kind"] != "age" and group["group"] != "not recorded"
    return str(group["group"]) if code else f"{group['kind']} {group['group']}"


# ------------------------------------------------------------- tables: a header and a line for each thing in them


def sections(part: Mapping[str, Any]) -> list[str]:
    """The tables of operating points, net benefit, groups, as Markdown parts."""
    return [
        "## Operating points",
        f"Thresholds {part.get('thresholds', TUNED)}; everything else is measured on other patients.",
        markdown(_operating_rows(part)),
        *(alarms.section(part["alarms"]) if "alarms" in part else []),
        "## Net benefit",
        "True positives per 100 predictions, less false positives weighed by the odds of the threshold; treat-none is "
        "0. Each interval holds for its threshold alone. The verdict first tests whether the ranking is chance, then "
        "whether the model helps at the prevalence, where treat-all equals treat-none, and then around it.",
        markdown(_benefit_rows(part)),
        *_group_parts(part),
    ]


def _operating_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["aimed specificity", "risk above", "specificity", "sensitivity", "PPV", "alerts per 100"]]
    for point in part["operating_points"]:
        fractions = (percent_with_interval(point[name]) for name in ("specificity", "sensitivity", "ppv"))
        rows.append([percent(point["aim"]), percent(point["threshold"]), *fractions, f"{point['alerts_per_100']:.1f}"])
    return rows


def _benefit_rows(part: Mapping[str, Any]) -> list[list[str]]:
    rows = [["threshold", "model", "treat-all", "gain over the better of treat-all and treat-none"]]
    for row in part["net_benefit"]:
        gain, ci = row["gain"]["value"], row["gain"]["ci"]
        shown = f"{100 * gain:.1f}" + (f" [{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]" if ci else "")
        rows.append([percent(row["threshold"]), f"{100 * row['model']:.1f}", f"{100 * row['all']:.1f}", shown])
    return rows


def _group_parts(part: Mapping[str, Any]) -> list[str]:
    """Nothing where neither ages nor sexes are recorded; the verdict says so."""
    if not part["subgroups"]:
        return []
    rows = [["group", "labels", "positives", "observed", "predicted", "AUROC [95 % CI]", "sensitivity"]]
    for kind in dict.fromkeys(group["kind"] for group in part["subgroups"]):
        own = [group for group in part["subgroups"] if group["kind"] == kind]
        shown = sorted(own, key=lambda group: -group.get("labels", 0))[:GROUPS_A_KIND]
        rows += [_group_row(group) for group in own if group in shown]
        if len(own) > len(shown):
            rows.append([f"{len(own) - len(shown)} smaller ones (results.json)", *[""] * 6])
    text = (
        f"Sensitivity is measured at the threshold for {percent(VERDICT_AIM)} specificity. Too few to judge: "
        f"under {ENOUGH_POSITIVES} patients with a positive label or {ENOUGH_SUBJECTS} in all. Groups under "
        f"{FEWEST_SUBJECTS} patients are not shown. Each interval holds for its group alone; whether "
        "risks are too high or too low, or patients ranked worse, allows for the number of groups."
    )
    return ["## Groups", text, markdown(rows)]


def _group_row(group: Mapping[str, Any]) -> list[str]:
    if group["hidden"]:
        return [_name(group), f"below {FEWEST_SUBJECTS} patients", *[""] * 5]
    return [
        _name(group) + ("" if group["judged"] else " (too few to judge)"),
        f"{group['labels']:,}",
        f"{group['positives']:,}",
        percent_with_interval(group["observed"]),
        percent(group["predicted"]) + (f", {group['wrong']}" if group["wrong"] else ""),
        with_interval(group["auroc"]),
        percent_with_interval(group["sensitivity"]),
    ]


def score_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Each task's held-out scores; below them those of the parts, where the model is a mean, and boosting's, where it
    was fitted, with the differences, and of a synthetic cohort the best possible ones.
    """
    header = ["split", "labels", "subjects", "prevalence", *SHOWN.values()]
    rows = [[*_task_column(found, "task"), *header]]
    for part in parts_of(found):
        if in_time.is_in_time(part):
            rows += [[*_task_column(found, part["task"]), *cells] for cells in in_time.score_cells(part)]
            continue
        parts = ", mean of three" if "plain" in part else ", mean of both" if "network" in part else ""
        sizes = [part["split"] + parts, str(part["num_labels"]), str(part["num_subjects"]), number(part["prevalence"])]
        rows.append([*_task_column(found, part["task"]), *sizes, *score_cells(part)])
        below = [*_task_column(found, "")]
        for key, name in OTHERS.items():
            other = part.get(key) or {}
            if "difference" in other:
                rows.append([*below, name, "", "", "", *score_cells(other)])
                rows.append([*below, "difference [97.5 % CI]", "", "", "", *score_cells(other["difference"])])
        if "ceiling" in part:
            rows.append([*below, "best possible", "", "", "", *score_cells(part["ceiling"])])
    return rows


def score_cells(scores: Mapping[str, Any]) -> list[str]:
    """Nothing for a score that is not there."""
    found = [scores.get(name, "") for name in SHOWN]
    return [with_interval(x) if isinstance(x, dict) else x if x == "" else number(x) for x in found]


def _recalibration_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Each model's temperature and shift, its calibration error before and after."""
    rows = [[*_task_column(found, "task"), "logits of", "temperature", "shift", "ECE before", "after"]]
    for part in parts_of(found):
        models = {"model": part, **{name: part.get(key) for key, name in OTHERS.items()}}
        for name, model in models.items():
            if model and "recalibration" in model:
                fitted = model["recalibration"]
                changes = f"{fitted['temperature']:.2f}", f"{fitted['shift']:+.2f}"
                errors = number(fitted["ece_before"]), number(model["ece"])
                rows.append([*_task_column(found, part["task"]), name, *changes, *errors])
    return rows


def _day_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Each task that predicts days."""
    rows = [["task", "labels", "mean absolute error [95 % CI]", "of the median", "concordance [95 % CI]"]]
    for part in parts_of(found):
        if "days" in part:
            days = part["days"]
            scores = [with_interval(days["mae"]), number(days["mae_of_median"]), with_interval(days["concordance"])]
            rows.append([part["task"], str(days["num_labels"]), *scores])
    return rows


def _split_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Each split's usable labels."""
    rows = [[*_task_column(found, "task"), "split", "labels", "positives", "subjects", "without events before"]]
    for part in parts_of(found):
        for split, sizes in part["splits"].items():
            counts = (str(sizes.get(key, 0)) for key in ("labels", "positives", "subjects", "without_events"))
            rows.append([*_task_column(found, part["task"]), split, *counts])
    return rows


def _trial_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Each trial, the best first; of the parameters those that vary."""
    order = sorted(found["trials"], key=lambda trial: -trial["best"].get(found["metric"], -1.0))
    names = [name for name in order[0]["parameters"] if len({str(t["parameters"][name]) for t in order}) > 1]
    rows = [["trial", "status", "steps", "best at", "mean", "auroc", "auprc", *names]]
    for trial in order:
        mark = " *" if trial["index"] == found["best_trial"] else ""
        best = trial["best"]
        scores = (number(best.get(name)) for name in ("mean", "auroc", "auprc"))
        values = (trial["parameters"][name] for name in names)
        parameters = (f"{value:.2g}" if isinstance(value, float) else str(value) for value in values)
        steps = [str(trial["step"] or 0), str(best.get("step", "-"))]
        rows.append([f"{trial['index']}{mark}", trial["status"], *steps, *scores, *parameters])
    return rows


def _task_column(found: Mapping[str, Any], text: str) -> list[str]:
    """Where there are several tasks, one column more."""
    return [text] if "tasks" in found else []
