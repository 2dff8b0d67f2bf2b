"""The model: packed equals alone, causality, mamba_ssm's parameters, decay groups, objectives' use of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from rows import in_double, joined, random_row, segment_of
from small_models import KINDS, timed
from torch import Tensor
from torch.nn import functional as F

from hymate.command import load
from hymate.config import ObjectiveConfig
from hymate.errors import UserError
from hymate.model.batch import Batch, Variables
from hymate.model.encoder import HyMaTE, MambaBlockMixer, RiskModel, decay_groups, load_pretrained
from hymate.model.mixers import Mamba1Mixer, Mamba2Mixer
from hymate.model.objectives import mean_loss
from hymate.model.pooling import FusionPooling, VariablePooling
from hymate.model.pretrain_model import PretrainModel
from hymate.model.variables import HORIZONS_HOURS, VariableSums
from hymate.training.pretraining import PretrainConfig

VOCAB = 30
LENGTHS = (7, 1, 23, 40)


def risk_model(name: str) -> RiskModel:
    torch.manual_seed(0)
    return timed(RiskModel(KINDS[name], VOCAB, ["readmission"])).double()


def logits(model: RiskModel, row: Batch) -> Tensor:
    """(S,), with their gradients."""
    return model.outputs(model.patient(row)[0])[0][:, 0]


@pytest.mark.parametrize("name", KINDS)
def test_packed_equals_alone_forward_and_gradients(name: str) -> None:
    model = risk_model(name).eval()
    row = in_double(random_row(LENGTHS, vocab_size=VOCAB))
    packed = logits(model, row)
    weights = torch.arange(1.0, len(LENGTHS) + 1, dtype=packed.dtype)
    (packed * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([logits(model, segment_of(row, s)) for s in range(len(LENGTHS))])
    (alone * weights).sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)  # logits are float32
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def test_event_states_of_a_unidirectional_model_see_only_the_past() -> None:
    torch.manual_seed(0)
    model = HyMaTE(KINDS["mamba2"], VOCAB).eval()
    row = random_row((30,), vocab_size=VOCAB)
    changed = replace(row, code_L=row.code_L.clone())
    changed.code_L[20] = 2 + (changed.code_L[20] - 1) % (VOCAB - 2)
    before, after = model(row), model(changed)
    torch.testing.assert_close(before[:20], after[:20])
    assert not torch.allclose(before[20:], after[20:])


@pytest.mark.parametrize("name", ["mamba2", "variables", "paper"])
def test_attention_weights_sum_to_one_for_each_patient(name: str) -> None:
    model = risk_model(name)
    row = in_double(random_row(LENGTHS, vocab_size=VOCAB))
    _, weight_LQ = model.patient(row)
    for a, b in zip(row.cu_seqlens, row.cu_seqlens[1:], strict=False):
        torch.testing.assert_close(weight_LQ[a:b].sum(0), torch.ones(weight_LQ.shape[1], dtype=weight_LQ.dtype))


@pytest.mark.parametrize("kind", [FusionPooling, VariablePooling])
def test_sums_over_a_history_are_exact_under_autocast(kind: type[FusionPooling | VariablePooling]) -> None:
    """Only the networks that make what is summed may be rounded to bf16."""
    torch.manual_seed(0)
    pooling = kind(d_model=16, num_queries=2).eval()
    row = random_row((3000, 700), vocab_size=VOCAB)
    h_LD, summed = torch.randn(row.num_events, 16), []
    if isinstance(pooling, VariablePooling):
        pooling.norm.register_forward_hook(lambda module, inputs, x_GMD: summed.append(x_GMD))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        if isinstance(pooling, VariablePooling):
            pooled, _ = pooling(h_LD, row, torch.randn(VOCAB, 16))
            found, last = pooled[0, 0, -16:], summed[0][: len(row.code_L[row.segment_L == 0].unique())]
            expected = last[:, 0].double().sum(0) / len(last) ** 0.5
        else:
            pooled, weight_LQ = pooling(h_LD, row)
            found = pooled[0, 0, :16]
            expected = weight_LQ[:3000, 0].double() @ h_LD[:3000].double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_fusion_pooling_returns_levels_and_least_squares_slopes() -> None:
    pooling = FusionPooling(d_model=3, num_queries=2).double()
    with torch.no_grad():
        pooling.query.weight.zero_()
        pooling.log_rate_Q.copy_(torch.tensor([1 / 5.0, 1e-9]).log())
    row = in_double(random_row((12,), vocab_size=VOCAB))
    h_LD = torch.randn(12, 3, dtype=torch.float64)
    pooled, weight_LQ = pooling(h_LD, row)
    hours_L = row.time_hours_L
    expected = torch.exp((hours_L - hours_L[-1]) / 5)
    torch.testing.assert_close(weight_LQ[:, 0], expected / expected.sum())
    torch.testing.assert_close(weight_LQ[:, 1], torch.full((12,), 1 / 12, dtype=torch.float64))
    level_QD, trend_QD = pooled.view(2, 2, 3)
    torch.testing.assert_close(level_QD[1], h_LD.mean(0))
    slope_D = torch.linalg.lstsq(torch.stack([hours_L, torch.ones(12)], 1).double(), h_LD).solution[0]
    variance = hours_L.var(correction=0)
    torch.testing.assert_close(trend_QD[1], slope_D * variance / (variance + 1).sqrt())


def test_variables_know_what_aggregate_features_would_say() -> None:
    row = in_double(random_row(LENGTHS, vocab_size=8))
    own = Variables.of(row, 8)
    sums = VariableSums.of(torch.zeros(row.num_events, 2).double(), row, 8).grouped(own.key_G, own.variable_L)
    features_GX = sums.features(row.lag_hours_A[sums.key_R // 8])
    assert len(features_GX) == len(set(zip(row.segment_L.tolist(), row.code_L.tolist(), strict=True)))
    for key, found in zip(sums.key_R.tolist(), features_GX, strict=True):
        own_L = (row.segment_L * 8 + row.code_L) == key
        assert own.variable_L[own_L].unique().numel() == 1
        end = row.time_hours_L[row.cu_seqlens[key // 8 + 1] - 1] + row.lag_hours_A[key // 8]
        t, z, rank = (x_L[own_L] for x_L in (row.time_hours_L, torch.asinh(row.value_L), row.quantile_L))
        expected = dict.fromkeys(VariablePooling.FEATURES, torch.zeros((), dtype=torch.float64))
        for hours in HORIZONS_HOURS:
            expected[f"events, forgotten within {hours:g} hours (log)"] = ((t - end) / hours).exp().sum().log1p()
        expected["hours since the first event (log)"] = (end - t[0]).log1p()
        expected["hours since the last event (log)"] = (end - t[-1]).log1p()
        known = ~z.isnan()
        if known.any():
            t, z, rank = t[known], z[known], rank[known]
            for hours in HORIZONS_HOURS:
                weights = ((t - t[-1]) / hours).exp()
                expected[f"mean value, forgotten within {hours:g} hours"] = (weights * z).sum() / weights.sum()
            spread = t.var(correction=0)
            covariance = ((t - t.mean()) * (z - z.mean())).mean()
            expected |= {
                "has a value": torch.ones(()),
                "standard deviation": z.std(correction=0),
                "trend, as FusionPooling's": covariance / (spread + 1).sqrt(),
                "mean rank": rank.mean(),
                **{"least value": z.min(), "least rank": rank.min()},
                **{"greatest value": z.max(), "greatest rank": rank.max()},
                **{"first value": z[0], "last value": z[-1], "last rank": rank[-1]},
            }
        wanted = torch.stack([expected[name].double() for name in VariablePooling.FEATURES])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_papers_model_is_the_published_one() -> None:
    config = load("pretrain", ["data.path=nowhere", "model=paper"], PretrainConfig).model
    torch.manual_seed(0)
    model = RiskModel(config, VOCAB, ["mortality"]).eval()
    row = random_row((12,), vocab_size=VOCAB)

    # the value's and the time's part of an event are the same whatever its code
    def embedded(code: int, value: float, hours: float) -> Tensor:
        columns = [torch.full((1,), x) for x in (value, torch.nan)]
        times = [torch.full((1,), x) for x in (hours, torch.nan)]
        return model.backbone.embedding(torch.tensor([code]), *columns, None, *times)[0]

    for value, hours in ((1.5, 0.0), (0.2, 30.0)):
        parts = [embedded(code, value, hours) - embedded(code, 0.2, 0.0) for code in (3, 9)]
        torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-6)
        assert (value, hours) == (0.2, 0.0) or parts[0].abs().max() > 0.01
    # Mamba layers and attention, each with its norm and nothing else
    assert [type(block.mixer).__name__ for block in model.backbone.blocks] == 2 * ["MambaBlockMixer"] + [
        "SelfAttention"
    ]
    for block in model.backbone.blocks:
        assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"mixer_norm", "mixer"}
    # attention is not masked
    later = replace(row, code_L=torch.cat([row.code_L[:-1], (row.code_L[-1:] - 1) % (VOCAB - 2) + 2]))
    assert not torch.allclose(model.backbone(row)[0], model.backbone(later)[0])
    # one attention over the events, and the static features through their network; no hand-made scalars
    patient_AME, weight_LQ = model.patient(row)
    assert patient_AME.shape == (1, 1, 2 * config.d_model) and weight_LQ.shape == (12, 1)
    pooled_D = weight_LQ[:, 0] @ model.backbone(row)
    torch.testing.assert_close(patient_AME[0, 0, : config.d_model], pooled_D, rtol=1e-4, atol=1e-6)
    unlike = replace(row, lag_hours_A=row.lag_hours_A + 100, gap_hours_L=row.gap_hours_L + 1)
    torch.testing.assert_close(model.patient(unlike)[0], patient_AME)
    for name, other in (("age_years_A", 30.0), ("static_code_F", 3)):
        changed = replace(row, **{name: torch.full_like(getattr(row, name), other)})
        assert not torch.allclose(model.patient(changed)[0], patient_AME)


def test_mixers_hold_the_parameter_names_and_shapes_of_mamba_ssm() -> None:
    mamba2 = Mamba2Mixer(d_model=32, d_state=16, d_conv=4, expand=2, headdim=16, ngroups=1, chunk_size=32)
    assert {n: tuple(p.shape) for n, p in mamba2.named_parameters()} == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 64 + 2 * 16 + 4, 32),
        "conv1d.weight": (64 + 2 * 16, 1, 4),
        "conv1d.bias": (96,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }
    mamba1 = Mamba1Mixer(d_model=32, d_state=16, d_conv=4, expand=2)
    assert {n: tuple(p.shape) for n, p in mamba1.named_parameters()} == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 32, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }


@pytest.mark.parametrize("kind", [Mamba1Mixer, Mamba2Mixer])
def test_steps_are_as_much_longer_as_the_hours_say(kind: type[Mamba1Mixer] | type[Mamba2Mixer]) -> None:
    """Events g hours apart, all: as a scan that knows no hours and has f(g) in its bias."""
    torch.manual_seed(0)
    timeless, aware = kind(32, d_state=4).double(), kind(32, d_state=4, time_aware=True).double()
    aware.load_state_dict(timeless.state_dict())
    u_BLD = torch.randn(2, 9, 32, dtype=torch.float64)
    hours = torch.full((2, 9), 30.0, dtype=torch.float64)
    torch.testing.assert_close(aware(u_BLD, hours), timeless(u_BLD))  # weights without hours leave the steps alone
    timed(aware)
    assert aware.time_weight is not None
    with torch.no_grad():
        bias = timeless.dt_bias if isinstance(timeless, Mamba2Mixer) else timeless.dt_proj.bias
        bias += aware.time_weight @ torch.tensor([31.0, 30 / 24 + 1, 30 / 720 + 1], dtype=torch.float64).log()
    torch.testing.assert_close(aware(u_BLD, hours), timeless(u_BLD))
    assert not torch.allclose(aware(u_BLD, 2 * hours), timeless(u_BLD))


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_time_aware_scan_of_both_directions_is_the_same_from_either_end(mixer: Literal["mamba1", "mamba2"]) -> None:
    """Of the same weights: back in time, the hours are those to the event after."""
    torch.manual_seed(0)
    config = replace(KINDS["timed"], mixer=mixer, bidirectional=True, d_state=4)
    both = timed(MambaBlockMixer(config)).double()
    assert both.backwards is not None
    both.backwards.load_state_dict(both.forwards.state_dict())
    row = in_double(random_row((9, 14), vocab_size=VOCAB))
    turned = [segment_of(row, s) for s in (1, 0)]
    for each in turned:
        each.gap_hours_L = torch.cat([each.gap_hours_L[:1], each.gap_hours_L[1:].flip(0)])
    x_LD = torch.randn(23, config.d_model, dtype=torch.float64)
    torch.testing.assert_close(both(x_LD.flip(0), joined(turned)).flip(0), both(x_LD, row))


def test_scan_parameters_norms_and_embeddings_never_decay() -> None:
    model = risk_model("timed")
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in decay_groups(model, 0.1) if g["weight_decay"] for p in g["params"]}
    kept = set(names.values()) - decayed
    assert all(n.endswith("weight") for n in decayed)
    assert {n for n in names.values() if n.endswith(("A_log", ".D", "bias", "time_weight"))} <= kept
    assert {n for n in names.values() if "norm" in n or "embedding.code" in n} <= kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba2", "bidirectional", "paper"])
def test_pretraining_learns_a_row_by_heart(name: str) -> None:
    torch.manual_seed(0)
    config = replace(KINDS[name], d_model=32)
    objective = ObjectiveConfig(forecast_weight=0.0 if config.sees_ahead else 1.0, forecast_variables=8)
    model = PretrainModel(config, objective, VOCAB)
    row = random_row((60, 50), vocab_size=VOCAB)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, mean_K = mean_loss(model.terms, model(row)["sum_K"], model.count_targets(row))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert 0 <= float(dict(zip(model.terms, mean_K.detach(), strict=True))["code_accuracy"]) <= 1


# ------------------------------------------------------------------------------------------------ several tasks

TASKS = ("readmission", "mortality", "length_of_stay")


def several_tasks(row: Batch, seed: int = 0) -> Batch:
    """Labels of TASKS and their weights, some missing, the last in days."""
    g = torch.Generator().manual_seed(seed)
    shape = (row.num_segments, len(TASKS))
    label_AT = (torch.rand(shape, generator=g) < 0.5).float()
    label_AT[torch.rand(shape, generator=g) < 0.3] = torch.nan
    days_AT = torch.full(shape, torch.nan)
    days_AT[:, 2] = torch.where(label_AT[:, 2].isnan(), torch.nan, 20 * torch.rand(shape[0], generator=g))
    weight_ST = 0.2 + torch.rand(shape, generator=g)
    return replace(row, label_AT=label_AT, days_AT=days_AT, label_weight_AT=weight_ST)


def several_heads() -> RiskModel:
    torch.manual_seed(0)
    return RiskModel(KINDS["mamba2"], VOCAB, TASKS, in_days=["length_of_stay"])


def test_the_loss_of_several_tasks_is_the_mean_of_their_own_weighted_ones() -> None:
    model = several_heads()
    row = several_tasks(random_row((7, 1, 23, 40, 9, 12, 5), vocab_size=VOCAB))
    logit_AT, log_days_AT = model.outputs(model.patient(row)[0])
    losses = []
    for task in range(len(TASKS)):
        at = ~row.label_AT[:, task].isnan()
        assert 0 < at.sum() < len(at)
        loss_N = F.binary_cross_entropy_with_logits(logit_AT[at, task], row.label_AT[at, task], reduction="none")
        if task == 2:
            days_N = F.smooth_l1_loss(log_days_AT[at, 2], torch.log(1 + row.days_AT[at, 2]), reduction="none")
            loss_N = loss_N + days_N
        weight_N = row.label_weight_AT[at, task]
        losses.append((weight_N * loss_N).sum() / weight_N.sum())
    torch.testing.assert_close(model.loss(row), torch.stack(losses).mean())
    assert log_days_AT[:, :2].isnan().all()


def test_one_task_of_several_is_the_model_of_that_task_alone() -> None:
    model = several_heads()
    row = several_tasks(random_row(LENGTHS, vocab_size=VOCAB))
    for task, name in enumerate(TASKS):
        alone = RiskModel(KINDS["mamba2"], VOCAB, [name], in_days=["length_of_stay"])
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("heads.") or name in k}
        alone.load_state_dict(state)
        torch.testing.assert_close(alone(row_of(row, task))["logit_AT"][:, 0], model(row)["logit_AT"][:, task])


def row_of(row: Batch, task: int) -> Batch:
    only = slice(task, task + 1)
    names = ("label_AT", "days_AT", "label_weight_AT")
    return replace(row, **{name: getattr(row, name)[:, only] for name in names})


def test_a_task_without_labels_in_a_row_gives_its_head_no_gradient() -> None:
    model = several_heads()
    row = several_tasks(random_row(LENGTHS, vocab_size=VOCAB))
    row.label_AT[:, 1:] = row.days_AT[:, 1:] = torch.nan
    row.label_AT[:, 0] = 1.0
    model.loss(row).backward()
    of_head = {name: torch.cat([p.grad.flatten() for p in model.heads[name].parameters()]) for name in TASKS}
    assert of_head["readmission"].abs().max() > 0
    assert not of_head["mortality"].any() and not of_head["length_of_stay"].any()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.backbone.parameters())


@pytest.mark.parametrize("pooling", ["fusion", "attention", "variables", "last"])
def test_members_learn_as_if_each_were_alone_and_are_averaged(pooling: str) -> None:
    config = replace(KINDS["mamba2"], pooling=pooling, members=3)
    torch.manual_seed(0)
    model = RiskModel(config, VOCAB, TASKS, in_days=["length_of_stay"]).eval()
    row = several_tasks(random_row(LENGTHS, vocab_size=VOCAB))
    together = model(row)
    model.loss(row).backward()
    said = []
    for member in range(3):
        alone = RiskModel(replace(config, members=1), VOCAB, TASKS, in_days=["length_of_stay"]).eval()
        state = {}
        for name, weight in model.state_dict().items():
            own = name.startswith(("pooling.", "heads."))
            state[name] = weight.chunk(3)[member] if own else weight
        alone.load_state_dict(state)
        said.append(alone(row))
        alone.loss(row).backward()
        for (name, all_of_them), weight in zip(model.named_parameters(), alone.parameters(), strict=True):
            if name.startswith(("pooling.", "heads.")) and weight.grad is not None:
                of_member = all_of_them.grad.chunk(3)[member] * 3
                torch.testing.assert_close(of_member, weight.grad, rtol=1e-4, atol=1e-5)
    for what in ("logit_AT", "log_days_AT", "sum_K"):
        mean = torch.stack([of_one[what] for of_one in said]).mean(dim=0)
        torch.testing.assert_close(together[what], mean, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["fusion", "attention", "variables"])
def test_pooling_moves_from_forecasting_to_the_risk_model(pooling: str) -> None:
    config = replace(KINDS["mamba2"], pooling=pooling)
    pretrained = PretrainModel(config, ObjectiveConfig(forecast_weight=1.0), VOCAB)
    model, other = (
        RiskModel(replace(config, pooling=kind), VOCAB, ["mortality"])
        for kind in (pooling, "fusion" if pooling == "variables" else "variables")
    )
    load_pretrained(model, pretrained.state_dict())
    assert pretrained.pooling is not None
    torch.testing.assert_close(model.pooling.state_dict(), pretrained.pooling.state_dict())
    new = {name: weight.clone() for name, weight in other.pooling.state_dict().items()}
    load_pretrained(other, pretrained.state_dict())
    torch.testing.assert_close(other.pooling.state_dict(), new)


def test_backbone_moves_from_pretraining_to_the_risk_model() -> None:
    pretrained = PretrainModel(KINDS["mamba2"], ObjectiveConfig(), VOCAB)
    model = RiskModel(KINDS["mamba2"], VOCAB, ["mortality"])
    load_pretrained(model, pretrained.state_dict())
    torch.testing.assert_close(model.backbone.state_dict(), pretrained.backbone.state_dict())
    with pytest.raises(UserError, match="do not fit"):
        load_pretrained(RiskModel(KINDS["mamba2"], VOCAB + 1, ["mortality"]), pretrained.state_dict())
