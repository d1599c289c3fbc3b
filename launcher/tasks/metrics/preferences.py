"""Losses of preference tuning on log-probabilities of completions, and the metrics of rewards. Runs in train workers.

All losses are per row, as their papers have them; sums and divisors of batches are the loop's. Log-probabilities are
sums over the tokens of a completion, or means where a name says `mean`.
"""

import math

import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from launcher.rundir.records import Histogram
from launcher.tasks.results import TaskMetrics

_BINS = 20


def dpo_losses(log_ratio_margin_B: torch.Tensor, beta: float, smoothing: float = 0.0) -> torch.Tensor:
    """Return the loss of direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    Args:
        log_ratio_margin_B: Log-ratio of policy to reference of the chosen minus that of the rejected completion, (B,).
        beta: Strength of the pull towards the reference.
        smoothing: Probability that a preference is the wrong way round (conservative DPO, Mitchell 2023).
    """
    margin_B = beta * log_ratio_margin_B
    return -(1 - smoothing) * logsigmoid(margin_B) - smoothing * logsigmoid(-margin_B)


def ipo_losses(mean_log_ratio_margin_B: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of identity preference optimization (Azar et al. 2023, arXiv:2310.12036, equation 17).

    Log-ratios are means over tokens: the authors clarified to TRL that theirs are, which the paper leaves open.

    Args:
        mean_log_ratio_margin_B: Mean log-ratio of the chosen minus that of the rejected completion, (B,).
        beta: Regularization; the paper's tau.
    """
    return (mean_log_ratio_margin_B - 1 / (2 * beta)) ** 2


def odds_ratio_losses(mean_chosen_B: torch.Tensor, mean_rejected_B: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the second term of ORPO's loss (Hong et al. 2024, arXiv:2403.07691, equations 4 and 7).

    The first one is the negative log-likelihood of the chosen completion per token of the batch.

    Args:
        mean_chosen_B: Mean log-probability of a token of the chosen completion, (B,).
        mean_rejected_B: Mean log-probability of a token of the rejected completion, (B,).
        weight: Weight of the term; the paper's lambda.
    """
    log_odds_B = (mean_chosen_B - _log_complement(mean_chosen_B)) - (mean_rejected_B - _log_complement(mean_rejected_B))
    return -weight * logsigmoid(log_odds_B)


def simpo_losses(mean_margin_B: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """Return the loss of simple preference optimization (Meng et al. 2024, arXiv:2405.14734, equation 6).

    Args:
        mean_margin_B: Mean log-probability of a token of the chosen minus that of the rejected completion, (B,).
        beta: Scale of the rewards.
        gamma: Margin of the rewards that is asked for.
    """
    return -logsigmoid(beta * mean_margin_B - gamma)


def kto_losses(
    log_ratio_N: torch.Tensor, mismatched_N: torch.Tensor, desirable_N: torch.Tensor, beta: float,
    weights: tuple[float, float],
) -> torch.Tensor:  # fmt: skip
    """Return the loss of Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8).

    Args:
        log_ratio_N: Log-ratio of policy to reference of each completion of a global batch, (N,).
        mismatched_N: Log-ratio of the completion of another row after the same prompt, (N,).
        desirable_N: 1 for a desirable completion, 0 for an undesirable one, (N,).
        beta: Risk aversion; the strength of the pull towards the reference.
        weights: Weights of desirable and of undesirable rows.
    """
    # The reference point, an estimate of the KL divergence, is a constant of the gradient.
    kl = mismatched_N.detach().mean().clamp(min=0)
    sign_N = 2.0 * desirable_N - 1
    weight_N = torch.where(desirable_N > 0, *weights)
    return weight_N * (1 - torch.sigmoid(beta * sign_N * (log_ratio_N - kl)))


def reward_losses(margin_B: torch.Tensor) -> torch.Tensor:
    """Return the loss of Bradley and Terry's model: -log of the probability that the chosen completion wins.

    Args:
        margin_B: Reward of the chosen minus that of the rejected completion, less the margin asked for, (B,).
    """
    return -logsigmoid(margin_B)


def _log_complement(log_probability: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)), accurate on both sides of -log 2 (Maechler 2012)."""
    # Zero, the logarithm of a probability that rounds to 1, has neither a finite value nor a gradient.
    x = log_probability.clamp(max=-1e-7)
    is_small = x < -0.6931471805599453
    # The branch that is not taken gets a harmless argument: `where` multiplies its gradient by zero, and inf by zero
    # is not a number.
    far = torch.log1p(-torch.exp(x.clamp(max=-0.5)))
    near = torch.log(-torch.expm1(x.clamp(min=-1.0)))
    return torch.where(is_small, far, near)


class PairMetrics(TaskMetrics):
    """Rewards of chosen and rejected completions.

    Args:
        has_reference: True if rewards compare with a reference, whose log-ratios are then a metric.
    """

    def __init__(self, has_reference: bool = False) -> None:
        self._has_reference = has_reference
        # Rewards of chosen and rejected completions, and log-ratios. Three numbers per row, for the histogram.
        self._rows: list[list[float]] = []

    def update(self, chosen_B: torch.Tensor, rejected_B: torch.Tensor, log_ratio_B: torch.Tensor | None = None) -> None:
        """Add B rows: rewards of both completions, and the mean log-ratio of both to the reference."""
        last_B = torch.zeros_like(chosen_B) if log_ratio_B is None else log_ratio_B
        self._rows += torch.stack([chosen_B.double(), rejected_B.double(), last_B.double()], 1).tolist()

    def compute(self) -> dict[str, float]:
        """Merge the rows of all ranks and return the metrics, the share of pairs in the right order first. Collective.

        A tie is an error: a model that prefers nothing has learned nothing.
        """
        self._rows = _merged(self._rows)
        rows = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, 3)
        chosen, rejected, log_ratio = (rows.sum(0) / max(len(rows), 1)).tolist()
        values = {
            "reward_accuracy": int((rows[:, 0] > rows[:, 1]).sum()) / max(len(rows), 1),
            "reward_margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        return {**values, "log_ratio": log_ratio} if self._has_reference else values

    def baseline(self) -> dict[str, float]:
        """Return the score of a coin."""
        return {"reward_accuracy": 0.5}

    def histogram(self) -> Histogram | None:
        """Return the distribution of reward margins; None where there are none, or not even two of them."""
        margins = [chosen - rejected for chosen, rejected, _ in self._rows]
        if len(set(margins)) < 2 or not all(map(math.isfinite, margins)):
            return None
        low, high = min(margins), max(margins)
        # A border at zero: what is below it is in the wrong order.
        width = (max(high, 0.0) - min(low, 0.0)) / _BINS
        edges = [width * k for k in range(math.floor(low / width), math.floor(high / width) + 2)]
        counts = torch.histogram(torch.tensor(margins, dtype=torch.float64), torch.tensor(edges, dtype=torch.float64))
        return Histogram(name="reward margin", edges=tuple(edges), counts=tuple(map(int, counts.hist.tolist())))


def _merged(rows: list[list[float]]) -> list[list[float]]:
    """Return the rows of all ranks, sorted, so that rounding does not depend on which rank has which. Collective."""
    if not dist.is_initialized():
        return sorted(rows)
    parts: list[list[list[float]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return sorted(row for part in parts for row in part)


class JudgedMetrics(TaskMetrics):
    """Rewards of desirable and undesirable completions against the KL divergence of the whole split.

    Args:
        beta: Scale of the rewards.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._rows: list[list[float]] = []

    def update(self, log_ratio_B: torch.Tensor, mismatched_B: torch.Tensor, desirable_B: torch.Tensor) -> None:
        """Add B rows, with the arguments of `kto_losses`."""
        # Three numbers per row, not sums: the reference point that rewards are compared with is known at the end.
        self._rows += torch.stack([log_ratio_B.double(), mismatched_B.double(), desirable_B.double()], 1).tolist()

    def compute(self) -> dict[str, float]:
        """Merge the rows of all ranks and return the metrics, the share on the right side first. Collective."""
        self._rows = _merged(self._rows)
        rows = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, 3)
        ratio_N, mismatched_N, desirable_N = rows.unbind(1)
        kl = max(float(mismatched_N.sum()) / max(len(rows), 1), 0.0)
        is_right_N = torch.where(desirable_N > 0, ratio_N > kl, ratio_N < kl)
        values = {"reward_accuracy": float(is_right_N.double().sum()) / max(len(rows), 1)}
        reward_of = {}
        # A split without rows of one kind has no mean of it, and so no margin.
        for name, is_kind_N in (("desirable_reward", desirable_N > 0), ("undesirable_reward", desirable_N == 0)):
            if is_kind_N.any():
                reward_of[name] = self._beta * float(ratio_N[is_kind_N].mean())
        if len(reward_of) == 2:
            values["reward_margin"] = reward_of["desirable_reward"] - reward_of["undesirable_reward"]
        return {**values, **reward_of, "kl": kl}

    def baseline(self) -> dict[str, float]:
        """Return the score of the more frequent judgement."""
        share = sum(row[2] for row in self._rows) / max(len(self._rows), 1)
        return {"reward_accuracy": max(share, 1 - share)}
