"""The model that pretraining trains: the encoder with the heads and losses of the self-supervised objectives.

What the heads are asked, a row's targets, is made in `hymate.model.objectives`.

Shape legend: as in `hymate.model.encoder`; N events that are asked, A anchors, K forecast variables, or terms,
J bins of time, R rank; V codes, in `TimeHead` without the special ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymate import ops
from hymate.config import ModelConfig, ObjectiveConfig
from hymate.model.batch import FIRST_CODE_ID, Asked, Batch, Coming
from hymate.model.encoder import HyMaTE, PatientHead
from hymate.model.hazards import bin_of, edges_of, hours_in_bins
from hymate.model.objectives import LossModel, ask, huber, next_events
from hymate.model.pooling import PatientPooling
from hymate.model.segments import wide


class PretrainModel(LossModel):
    """HyMaTE with the heads of the self-supervised objectives (`hymate.model.objectives`).

    terms: the weight in the loss of each term and, 0, of its own metric: "code_loss", "code_accuracy" and so on.
    """

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig, vocab_size: int) -> None:
        super().__init__()
        self.objective = objective
        self.terms: dict[str, float] = {}
        self.backbone = HyMaTE(config, vocab_size)
        self.code_head = CodeHead(config, vocab_size) if objective.code_weight else None
        self.value_head = _event_head(config, 1) if objective.value_weight else None
        foretells = objective.forecast_weight or objective.time_to_event_weight
        self.pooling = PatientPooling(config) if foretells else None
        self.forecast_head: PatientHead | None = None
        self.time_head: TimeHead | None = None
        if objective.code_weight:
            self.terms |= {"code_loss": objective.code_weight, "code_accuracy": 0.0}
        if objective.value_weight:
            self.terms |= {"value_loss": objective.value_weight, "value_mae": 0.0}
        if objective.forecast_weight and self.pooling is not None:
            self.forecast_head = PatientHead(config, self.pooling.width, 2 * objective.forecast_variables)
            weight = objective.forecast_weight
            self.terms |= {"measured_loss": weight, "forecast_loss": weight, "forecast_mae": 0.0}
        if objective.time_to_event_weight and self.pooling is not None:
            self.time_head = TimeHead(config, objective, vocab_size, self.pooling.width)
            weight = objective.time_to_event_weight
            self.terms |= {"time_loss": weight, "next_value_loss": weight, "next_value_mae": 0.0}

    def count_targets(self, batch: Batch) -> Tensor:
        """How many targets each of `terms` has in a row: (K,), float64."""
        return self._asked(batch).count_K

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """ "sum_K": see `LossModel`."""
        asked = self._asked(batch)
        h_LD = self.backbone(replace(batch, code_L=asked.code_L), asked.hidden_L)
        sums: dict[str, Tensor] = {}
        if self.code_head is not None:
            at = asked.code_N
            sums["code_loss"], sums["code_accuracy"] = self.code_head(h_LD[at], batch.code_L[at])
        if self.value_head is not None:
            at = asked.value_N
            error = self.value_head(h_LD[at])[:, 0].float() - batch.value_L[at].clamp(-5, 5)
            sums["value_loss"], sums["value_mae"] = huber(error), error.abs().sum()
        ahead = asked.ahead
        if self.pooling is not None and self.forecast_head is not None and ahead is not None:
            patient_AME, _ = self.pooling(h_LD[ahead.at_L], ahead.past, self.backbone.embedding)
            measured_AMK, value_AMK = self.forecast_head(patient_AME).float().chunk(2, dim=2)
            members = measured_AMK.shape[1]
            target_AMK = ahead.measured_AK.float()[:, None].expand_as(measured_AMK)
            found = F.binary_cross_entropy_with_logits(measured_AMK, target_AMK, reduction="none")
            error_AMK = value_AMK - ahead.value_AK[:, None].clamp(-5, 5)
            error = error_AMK.flatten()[ahead.value_N]
            sums["measured_loss"] = found[ahead.whole_N].sum() / members
            sums["forecast_loss"], sums["forecast_mae"] = huber(error) / members, error.abs().sum() / members
        coming = asked.coming
        if self.pooling is not None and self.time_head is not None and coming is not None:
            patient_AME, _ = self.pooling(h_LD, coming.past(batch), self.backbone.embedding)
            found = self.time_head(patient_AME, coming, self.backbone.embedding.code.weight)
            sums |= dict(zip(("time_loss", "next_value_loss", "next_value_mae"), found, strict=True))
        return {"sum_K": torch.stack([sums[name] for name in self.terms])}

    def learn_times(self, rows: Iterable[Batch]) -> None:
        """Take bins and first hazards of `time_to_event` from what comes next in some rows."""
        if self.time_head is not None:
            self.time_head.start_from(next_events(row, self.objective) for row in rows)

    def ask(self, batch: Batch) -> Batch:
        """The row with its `asked`."""
        return replace(batch, asked=self._asked(batch))

    def _asked(self, batch: Batch) -> Asked:
        if batch.asked is not None:
            return batch.asked
        asked = ask(batch, self.objective, self.terms, self.backbone.config.members)
        if self.pooling is not None and asked.ahead is not None:
            past = self.pooling.ask(asked.ahead.past, self.backbone.embedding)
            asked = replace(asked, ahead=replace(asked.ahead, past=past))
        if self.pooling is not None and asked.coming is not None:
            past = self.pooling.ask(asked.coming.past(batch), self.backbone.embedding)
            asked = replace(asked, coming=replace(asked.coming, variables=past.variables, ends=past.ends))
        return asked


class ScoredLinear(nn.Linear):
    """A linear layer onto classes that never holds all its outputs: only how well they meet their targets."""

    def forward(self, x_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Sum of the cross-entropies of N events, and for how many the target is the likeliest code."""
        return ops.linear_cross_entropy(x_ND, self.weight, self.bias, target_N)


class CodeHead(nn.Module):
    """The head of the hidden codes: the sum of their cross-entropies, and how many of them it gets right."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.hidden = _event_head(config, 1)[:-1]
        self.out = ScoredLinear(config.d_model, vocab_size)

    def forward(self, h_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) states of the events whose codes are hidden, and these codes."""
        return self.out(self.hidden(h_ND), target_N)


class TimeHead(nn.Module):
    """When each code comes next after an anchor, and with which value: the hazards of many codes by a low-rank product.

    The logarithm of a code's hazard, a number of events in an hour, is constant in each bin of time: a product of a
    vector of the anchor and bin with a projection of the code's embedding, and the code's own rate (MOTOR, arXiv
    2301.03150). The value's mean is such a product, too. Of several members each learns from its own anchors.

    edges: hours between the bins; learned, as the first rates, by `start_from`.
    """

    edges: Tensor

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig, vocab_size: int, width_in: int) -> None:
        super().__init__()
        self.bins, self.rank = objective.time_to_event_bins, objective.time_to_event_rank
        self.anchor = PatientHead(config, width_in, (self.bins + 1) * self.rank)
        self.code = nn.Linear(config.d_model, 2 * self.rank, bias=False)
        self.log_rate_V = nn.Parameter(torch.zeros(vocab_size - FIRST_CODE_ID))
        self.value_V = nn.Parameter(torch.zeros(vocab_size - FIRST_CODE_ID))
        self.register_buffer("edges", torch.logspace(0, 4, self.bins - 1))

    def forward(self, patient_AME: Tensor, coming: Coming, code_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patient vectors at the anchors, the embedding of all codes -> the sums, over the codes that came, of minus
        the log-likelihood of all codes, the Huber loss of values and their absolute error.
        """
        members = patient_AME.shape[1]
        member_A = (coming.draw_A * members).long().clamp(max=members - 1)
        x_AX = self.anchor(patient_AME)[torch.arange(len(member_A), device=member_A.device), member_A]
        rate_AJR, value_AR = x_AX[:, : self.bins * self.rank].unflatten(1, (self.bins, -1)), x_AX[:, -self.rank :]
        rate_VR, value_VR = self.code(code_VD)[FIRST_CODE_ID:].chunk(2, dim=1)
        code_N, edges = coming.code_N - FIRST_CODE_ID, self.edges.to(coming.hours_N.dtype)
        at_risk_AJ = hours_in_bins(coming.until_hours_A, edges)
        loss = ops.linear_hazard_loss(
            rate_AJR,
            rate_VR,
            self.log_rate_V,
            at_risk_AJ,
            coming.anchor_N,
            code_N,
            bin_of(coming.hours_N, edges),
            at_risk_AJ[coming.anchor_N] - hours_in_bins(coming.hours_N, edges),
            coming.lengths,
        )
        at = coming.valued_N
        code_n = code_N[at]
        mean_n = wide(value_AR[coming.anchor_N[at]] * value_VR[code_n]).sum(dim=1) + self.value_V[code_n]
        error_n = mean_n - coming.value_N[at].clamp(-5, 5)
        return loss, huber(error_n), error_n.abs().sum()

    def start_from(self, rows: Iterable[Coming]) -> None:
        """Edges between which as many events come, and each code's mean hazard, of what comes next in some rows.

        Where nothing comes, both stay as they are. A code that never comes there has half an event.
        """
        found = [(c.until_hours_A, c.until_hours_A[c.anchor_N], c.hours_N, c.code_N - FIRST_CODE_ID) for c in rows]
        until_A, until_N, hours_N, code_N = map(torch.cat, zip(*found, strict=True))
        if not len(hours_N):
            return
        spared_N = until_N.double() - hours_N.double()
        at_risk_V = until_A.double().sum() - torch.bincount(code_N, spared_N, len(self.log_rate_V))
        count_V = torch.bincount(code_N, minlength=len(self.log_rate_V))
        with torch.no_grad():
            self.edges.copy_(edges_of(hours_N, self.bins))
            self.log_rate_V.copy_(((count_V + 0.5) / at_risk_V).log())


def _event_head(config: ModelConfig, width_out: int) -> nn.Sequential:
    """From the states of events."""
    return nn.Sequential(
        nn.RMSNorm(config.d_model),
        nn.Linear(config.d_model, config.d_model),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.d_model, width_out),
    )
