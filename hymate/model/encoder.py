"""The encoder (arXiv 2509.24118) and the risk model on it, from the parts up: mixers, block, `HyMaTE`, `RiskModel`.

The events' embedding is in `hymate.model.embedding`, the Mamba mixers in `hymate.model.mixers`, pooling into patient
vectors in `hymate.model.pooling`, the heads of pretraining in `hymate.model.pretrain_model`. configs/model/paper.yaml
is the published model; each of our changes is an option.

Shape legend (with `hymate.model.batch`):
    L  events in the packed row     S  segments (patients' windows)     F  static events
    B  batch rows of a mixer        D  d_model                          V  vocabulary size
    Q  pooling queries              E  width of the patient vector      T  tasks
    M  members: poolings and heads over the one encoder
    C  causes of a task in time, J bins of its hazards, H its horizons; X all incidences of the tasks in time: of
       each task in turn C * H
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymate import ops
from hymate.config import InTime, ModelConfig
from hymate.errors import UserError
from hymate.model.batch import Batch
from hymate.model.embedding import EMBEDDINGS
from hymate.model.hazards import cumulative_incidence, edges_of, first_hazards, log_likelihood, smooth_basis
from hymate.model.mixers import BlockState, Mamba1Mixer, Mamba2Mixer
from hymate.model.objectives import LossModel
from hymate.model.pooling import MemberLinear, PatientPooling

TIME_BINS = 8  # of the hazards of a task in time
BASIS_JJ = smooth_basis(TIME_BINS)
TYPICAL_DAYS = 5.0  # what a new head predicts, so that it need not learn the scale first


# ------------------------------------------------------------------------------------------------------ mixers


class MambaBlockMixer(nn.Module):
    """The M of a layer pattern: one Mamba mixer, or one in each direction whose outputs are added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.forwards = _mamba(config)
        self.backwards = _mamba(config) if config.bidirectional else None

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D), each segment by itself."""
        gap_hours_1L, segment_1L = batch.gap_hours_L[None], batch.segment_L[None]
        y_LD = self.forwards(x_LD[None], gap_hours_1L, segment_1L)[0]
        if self.backwards is not None:
            ahead_hours_1L = F.pad(gap_hours_1L[:, 1:], (0, 1))  # a segment's first gap is 0, so its last is, too
            y_LD = y_LD + self.backwards(x_LD[None], ahead_hours_1L, segment_1L, reverse=True)[0]
        return y_LD

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), and what they leave to those after them."""
        assert self.backwards is None, "a backward mixer would need the events to come"
        y_BLD, (conv, scan) = self.forwards.carry(x_LD[None], batch.gap_hours_L[None], state)
        return y_BLD[0], (conv.clone(), scan)  # a view would keep all of this chunk's inputs


def _mamba(c: ModelConfig) -> Mamba1Mixer | Mamba2Mixer:
    if c.mixer == "mamba1":
        return Mamba1Mixer(c.d_model, c.d_state, c.d_conv, c.expand, time_aware=c.time_aware_scan)
    widths = (c.d_model, c.d_state, c.d_conv, c.expand)
    return Mamba2Mixer(*widths, headdim=c.headdim, chunk_size=c.chunk_size, time_aware=c.time_aware_scan)


class SelfAttention(nn.Module):
    """The A of a layer pattern: multi-head attention within a segment; position comes from the events' time."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_heads, config.window or None
        self.causal = config.causal and not config.bidirectional
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D), each segment by itself."""
        q, k, v = self.qkv(x_LD).unflatten(-1, (3, self.num_heads, -1)).unbind(dim=1)
        y_LHE = ops.packed_attention(
            q, k, v, batch.cu_seqlens, bounds=batch.bounds, window=self.window, causal=self.causal
        )
        return self.out(y_LHE.flatten(1))

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), and what they leave to those after them."""
        assert self.window is not None and self.causal, "without a window the state would grow"
        q, k, v = self.qkv(x_LD).unflatten(-1, (3, self.num_heads, -1)).unbind(dim=1)
        if state is not None:
            k, v = (torch.cat(past_and_now) for past_and_now in zip(state, (k, v), strict=True))
        y_LHE = ops.continued_attention(q, k, v, window=self.window)
        kept = max(0, len(k) - self.window + 1)
        return self.out(y_LHE.flatten(1)), (k[kept:].clone(), v[kept:].clone())


class GRU(nn.Module):
    """The G of a layer pattern: a gated recurrent unit (Cho et al. 2014), the baseline of the field's tables."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(config.d_model, config.d_model, batch_first=True)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D), each segment by itself."""
        # padding comes after the events and changes none of them; on a CPU torch's packed sequences take twice as long
        padded_SLD = nn.utils.rnn.pad_sequence(x_LD.split(batch.lengths), batch_first=True)
        segment_L = batch.segment_L.long()
        place_L = torch.arange(len(x_LD), device=x_LD.device) - batch.bounds[segment_L]
        return self.out(self.gru(padded_SLD)[0][segment_L, place_L])

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), and what they leave to those after them."""
        y_BLD, h_1BD = self.gru(x_LD[None], state[0] if state else None)
        return self.out(y_BLD[0]), (h_1BD, h_1BD.new_empty(0))


# ----------------------------------------------------------------------------------------------------- encoder


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, d_model: int, ratio: float) -> None:
        super().__init__()
        hidden = int(d_model * ratio)
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.silu(gate))


class ResidualDropout(nn.Module):
    """Add a branch to the residual stream; in training, elements of the branch are dropped."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Both of one shape."""
        return ops.add_dropout(x, branch, self.p if self.training else 0.0)


MIXERS: dict[str, Callable[[ModelConfig], MambaBlockMixer | SelfAttention | GRU]] = {
    "M": MambaBlockMixer,
    "A": SelfAttention,
    "G": GRU,
}


class Block(nn.Module):
    """Pre-norm mixer, then pre-norm gated MLP (none where mlp_ratio is 0), each added to its input."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model)
        self.mixer = MIXERS[kind](config)
        self.mlp: GatedMLP | None = None
        if config.mlp_ratio:
            self.mlp_norm = nn.RMSNorm(config.d_model)
            self.mlp = GatedMLP(config.d_model, config.mlp_ratio)
        self.add = ResidualDropout(config.dropout)

    def forward(self, x_LD: Tensor, batch: Batch) -> Tensor:
        """(L, D) -> (L, D)."""
        x_LD = self.add(x_LD, self.mixer(self.mixer_norm(x_LD), batch))
        return x_LD if self.mlp is None else self.add(x_LD, self.mlp(self.mlp_norm(x_LD)))

    def carry(self, x_LD: Tensor, batch: Batch, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """One history's next events (L, D) -> (L, D), without dropout, and what they leave to those after them."""
        mixed_LD, state = self.mixer.carry(self.mixer_norm(x_LD), batch, state)
        x_LD = x_LD + mixed_LD
        return x_LD if self.mlp is None else x_LD + self.mlp(self.mlp_norm(x_LD)), state


class HyMaTE(nn.Module):
    """The encoder: events of packed patient histories -> their contextual states.

    Args:
        config: widths and layer pattern.
        vocab_size: V, ids including the unknown and the mask id.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = EMBEDDINGS[config.embedding](vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layers)
        self.norm = nn.RMSNorm(config.d_model)
        for block in self.blocks:
            _scale_residual(block, len(self.blocks) * (2 if config.mlp_ratio else 1))

    def encode(self, batch: Batch, hidden_L: Tensor | None = None) -> Tensor:
        """Contextual event states (L, D); hidden_L: bool, events whose value the model must not see."""
        h_LD = self._embed(batch, hidden_L)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                h_LD = checkpoint(block, h_LD, batch, use_reentrant=False)
            else:
                h_LD = block(h_LD, batch)
        return self.norm(h_LD)

    forward = encode

    def carry(self, batch: Batch, states: Sequence[BlockState] | None) -> tuple[Tensor, tuple[BlockState, ...]]:
        """`encode` for a history (one segment) that goes on from the events that left `states`, None at its start.

        Returns the contextual states (L, D) of its next events and what the blocks carry on.
        """
        h_LD, carried = self._embed(batch), []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            h_LD, state = block.carry(h_LD, batch, states[number] if states else None)
            carried.append(state)
        return self.norm(h_LD), tuple(carried)

    def _embed(self, batch: Batch, hidden_L: Tensor | None = None) -> Tensor:
        events = (batch.code_L, batch.value_L, batch.quantile_L)
        return self.embedding(*events, hidden_L, batch.time_hours_L, batch.gap_hours_L)


def _scale_residual(block: nn.Module, num_branches: int) -> None:
    """Shrink what each of the encoder's branches adds, so that the residual stream keeps its size (GPT-2)."""
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if name.endswith(("out_proj.weight", "out.weight", "down.weight")):
                weight.div_(math.sqrt(num_branches))


# -------------------------------------------------------------------------------------------------- risk model


class PatientHead(nn.Module):
    """Each member's outputs of its patient vectors."""

    def __init__(self, config: ModelConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width_in, elementwise_affine=False)
        self.hidden = MemberLinear(config.members, width_in, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.out = MemberLinear(config.members, config.d_model, width_out)

    def forward(self, patient_AME: Tensor) -> Tensor:
        """(S, M, E) -> (S, M, O)."""
        return self.out(self.dropout(F.gelu(self.hidden(self.norm(patient_AME)))))


class IncidenceHead(PatientHead):
    """When which of the causes of a task in time comes first: each one's hazard a day, constant in bins of time.

    edges: days between the bins; learned, as the first hazards, by `start_from`.
    basis_JJ: a cause's log hazards are the sum of these rows (`smooth_basis`), weighed by what the head says. Each bin
        has few events, so a risk factor that acts in all of them would be learned slowly bin by bin.
    """

    edges: Tensor
    horizons_H: Tensor
    basis_JJ: Tensor

    def __init__(self, config: ModelConfig, width_in: int, asked: InTime) -> None:
        super().__init__(config, width_in, asked.num_causes * TIME_BINS)
        self.num_causes = asked.num_causes
        self.register_buffer("edges", torch.linspace(0, asked.horizons_days[-1], TIME_BINS + 1)[1:-1])
        self.register_buffer("horizons_H", torch.tensor(asked.horizons_days), persistent=False)
        self.register_buffer("basis_JJ", BASIS_JJ.clone())

    def log_hazards(self, patient_AME: Tensor) -> Tensor:
        """Float32 (A, M, C, J)."""
        weight_AMCJ = self(patient_AME).float().unflatten(2, (self.num_causes, TIME_BINS))
        with torch.autocast(weight_AMCJ.device.type, enabled=False):
            return weight_AMCJ @ self.basis_JJ.float()

    def incidence(self, log_hazard_AMCJ: Tensor) -> Tensor:
        """By each horizon, the mean over members: (A, C, H)."""
        members = log_hazard_AMCJ.shape[1]
        each_NCH = cumulative_incidence(log_hazard_AMCJ.flatten(0, 1), self.horizons_H, self.edges)
        return each_NCH.unflatten(0, (-1, members)).mean(dim=1)

    def log_likelihood(self, log_hazard_AMCJ: Tensor, days_A: Tensor, cause_A: Tensor) -> Tensor:
        """Of what came first, the mean over members: (A,)."""
        members = log_hazard_AMCJ.shape[1]
        days_N, cause_N = (x_A.repeat_interleave(members) for x_A in (days_A, cause_A))
        each_N = log_likelihood(log_hazard_AMCJ.flatten(0, 1), days_N, cause_N, self.edges)
        return each_N.unflatten(0, (-1, members)).mean(dim=1)

    def start_from(self, days_N: Tensor, cause_N: Tensor) -> None:
        """Edges between which as many events come, and each cause's mean hazards, of what came to some patients."""
        assert self.out.bias is not None
        with torch.no_grad():
            self.edges.copy_(edges_of(days_N[cause_N > 0], TIME_BINS))
            hazard_CJ = first_hazards(days_N, cause_N, self.edges, self.num_causes)
            self.out.bias.copy_((hazard_CJ.log() @ torch.linalg.inv(self.basis_JJ.double())).flatten())


class RiskModel(LossModel):
    """HyMaTE with one head for each task: its logit, and for the tasks `in_days` also log(1 + days). For those
    `in_time` the incidences by each of their horizons; their logit is that of the event's incidence by the last.

    What the members say is averaged; each learns as if it were alone (deep ensembles, Lakshminarayanan et al. 2017).

    terms: the weight in the loss of each task's "TASK/loss" and, in days, "TASK/days_loss". The loss is the mean over
    tasks of the weighted mean over a task's labels.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        tasks: Sequence[str],
        in_days: Collection[str] = (),
        in_time: Mapping[str, InTime] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = HyMaTE(config, vocab_size)
        self.pooling = PatientPooling(config)
        width, in_time = self.pooling.width, in_time or {}
        self.heads = nn.ModuleDict(
            {
                task: IncidenceHead(config, width, in_time[task])
                if task in in_time
                else _task_head(config, width, task in in_days)
                for task in tasks
            }
        )
        self._in_days = [number for number, task in enumerate(tasks) if task in in_days]
        self._in_time = [number for number, task in enumerate(tasks) if task in in_time]
        self._binary = [number for number, task in enumerate(tasks) if task not in in_time]
        names = [f"{tasks[number]}/loss" for number in self._binary]
        names += [f"{tasks[number]}/days_loss" for number in self._in_days]
        names += [f"{tasks[number]}/loss" for number in self._in_time]
        self.terms = dict.fromkeys(names, 1 / len(tasks))

    def ask(self, batch: Batch) -> Batch:
        """The row with what the pooling needs."""
        return self.pooling.ask(batch, self.backbone.embedding)

    def patient(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Patient vectors (S, M, E) and attention weights (L, M * Q) or None."""
        return self.pooling(self.backbone(batch), batch, self.backbone.embedding)

    def outputs(self, patient_AME: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and log(1 + days), NaN for tasks without days: float32 (S, T) each."""
        logit_ATM, log_days_ATM, _ = self._of_members(patient_AME)
        return logit_ATM.mean(dim=2), log_days_ATM.mean(dim=2)

    def _of_members(self, patient_AME: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits and log(1 + days) (A, T, M), and of each task in time the logarithms of hazards (A, M, C, J)."""
        logits, days, log_hazards = [], [], []
        for head in self.heads.values():
            if isinstance(head, IncidenceHead):
                log_hazards.append(head.log_hazards(patient_AME))
                risk_A1 = head.incidence(log_hazards[-1])[:, 0, -1:]
                logits.append(torch.logit(risk_A1, eps=1e-7).expand(-1, patient_AME.shape[1]))
                days.append(torch.full_like(logits[-1], torch.nan))
                continue
            o_AMO = head(patient_AME).float()
            logits.append(o_AMO[..., 0])
            days.append(o_AMO[..., 1] if o_AMO.shape[2] == 2 else torch.full_like(o_AMO[..., 0], torch.nan))
        return torch.stack(logits, dim=1), torch.stack(days, dim=1), log_hazards

    def _incidence_heads(self) -> list[IncidenceHead]:
        return [head for head in self.heads.values() if isinstance(head, IncidenceHead)]

    def learn_times(self, label_ET: Tensor, days_ET: Tensor) -> None:
        """Take bins and first hazards of the tasks in time from the training labels."""
        for number, head in zip(self._in_time, self._incidence_heads(), strict=True):
            known_E = ~label_ET[:, number].isnan()
            head.start_from(days_ET[known_E, number], label_ET[known_E, number])

    def count_targets(self, batch: Batch) -> Tensor:
        """The sum of the weights of the labels that each of `terms` has in a row: (K,), float64."""
        return torch.cat([_weighed(target_SX, w_SX).sum(0) for target_SX, w_SX in self._targets(batch)]).double()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """ "logit_AT", "log_days_AT", "incidence_AX" and "sum_K": the weighted sum over labels of the binary
        cross-entropy, for days of the Huber loss of their logarithms, in time of minus the log-likelihood; of members
        the mean of theirs.
        """
        logit_ATM, log_days_ATM, log_hazards = self._of_members(self.patient(batch)[0])

        def summed(error: Callable[..., Tensor], predicted_SXM: Tensor, target_SX: Tensor, weight_SX: Tensor) -> Tensor:
            target_SXM = torch.nan_to_num(target_SX)[:, :, None].expand_as(predicted_SXM)
            error_SX = error(predicted_SXM, target_SXM, reduction="none").mean(dim=2)
            return (error_SX * _weighed(target_SX, weight_SX)).sum(dim=0)

        labels, days, (cause_SX, weight_SX) = self._targets(batch)
        risks = summed(F.binary_cross_entropy_with_logits, _columns(logit_ATM, self._binary), *labels)
        sums = [risks, summed(F.huber_loss, _columns(log_days_ATM, self._in_days), *days)]
        days_SX = torch.nan_to_num(_columns(batch.days_AT, self._in_time))
        weight_SX, incidences = _weighed(cause_SX, weight_SX), [logit_ATM.new_zeros(len(logit_ATM), 0)]
        for number, (head, log_hazard_AMCJ) in enumerate(zip(self._incidence_heads(), log_hazards, strict=True)):
            cause_A = torch.nan_to_num(cause_SX[:, number])
            found_A = head.log_likelihood(log_hazard_AMCJ, days_SX[:, number], cause_A)
            sums.append(-(found_A * weight_SX[:, number]).sum(dim=0, keepdim=True))
            incidences.append(head.incidence(log_hazard_AMCJ).flatten(1))
        said = {"logit_AT": logit_ATM.mean(dim=2), "log_days_AT": log_days_ATM.mean(dim=2)}
        said["incidence_AX"] = torch.cat(incidences, dim=1)
        if not self.training:
            said = {name: tensor.detach() for name, tensor in said.items()}
        return {"sum_K": torch.cat(sums), **said}

    def _targets(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Labels and their weights; the logarithms of days and theirs, of the tasks that have them; what came first and
        theirs, of the tasks in time.
        """
        label_SX, days_SX = _columns(batch.label_AT, self._binary), _columns(batch.days_AT, self._in_days)
        cause_SX = _columns(batch.label_AT, self._in_time)
        targets = (label_SX, self._binary), (days_SX.log1p(), self._in_days), (cause_SX, self._in_time)
        return [(target_SX, _columns(batch.label_weight_AT, tasks)) for target_SX, tasks in targets]

    def recalibrate(self, task: str, temperature: float, shift: float) -> None:
        """Make the task's logits what they are now / temperature + shift, by its head's last weights."""
        head = self.heads[task]
        assert isinstance(head, PatientHead)
        last, bias = head.out, head.out.bias
        assert bias is not None
        with torch.no_grad():
            last.weight[:, :, 0] /= temperature
            bias[:, 0] = bias[:, 0] / temperature + shift


def _columns(x_ST: Tensor, tasks: Sequence[int]) -> Tensor:
    """Those of some tasks; slices, for a list of indices would be sent to the device."""
    return torch.cat([x_ST[:, :0], *(x_ST[:, task : task + 1] for task in tasks)], dim=1)


def _weighed(target_SX: Tensor, weight_SX: Tensor) -> Tensor:
    """The weights of the targets that are there, 0 of others."""
    return torch.where(target_SX.isnan(), 0.0, weight_SX)


def _task_head(config: ModelConfig, width_in: int, in_days: bool) -> PatientHead:
    head = PatientHead(config, width_in, 2 if in_days else 1)
    if in_days:
        assert head.out.bias is not None
        nn.init.constant_(head.out.bias[:, 1], math.log1p(TYPICAL_DAYS))
    return head


def load_pretrained(model: nn.Module, state: Mapping[str, Tensor], others: Sequence[str] = ("pooling",)) -> None:
    """Copy the backbone's weights out of a pretrained model's state, and those of other parts where it has the same.

    A scan that becomes aware of time begins as it was. A pooling with fewer members takes the first ones, and `elapsed`
    may be in only one of both. Raises UserError when the backbone's weights don't fit.
    """
    assert isinstance(model.backbone, HyMaTE)
    own = model.backbone.state_dict()
    weights = {name: weight for name, weight in own.items() if name.endswith(".time_weight")}
    weights |= {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    for name in own:
        if name not in weights or weights[name].shape != own[name].shape:
            raise UserError(
                f"the pretrained weights do not fit this model at backbone.{name}: use the model and vocabulary "
                "settings of the run they come from"
            )
    model.backbone.load_state_dict(weights)
    for part in others:
        weights = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        new = model.get_submodule(part).state_dict()
        if part == "pooling":
            weights = {k: v[: len(new[k])] if k in new else v for k, v in weights.items()}
        one_has = {k for k in weights.keys() ^ new.keys() if k.startswith("elapsed.")}
        weights = {k: v for k, v in weights.items() if k not in one_has}
        if {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in new.items() if k not in one_has}:
            model.get_submodule(part).load_state_dict({**new, **weights})


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay; biases, norms, embeddings and the scan's own weights (A_log, D, dt_bias,
    time_weight) never do.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or id(p) in embeddings or name.endswith(("A_log", "bias", "time_weight"))
            (kept if plain else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
