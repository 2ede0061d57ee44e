"""Prototype probe: learned prototypes, each matched with the most similar of a clip's patch tokens.

Letters: N clips, R rows of a batch, P patches (differs between clips), D width, K prototypes, C classes.

A pooled vector loses what is audible in a small part of a clip. Here K prototypes are compared with each of the P
tokens by cosine; the best match of each prototype is kept, and a linear layer reads the K matches. This is prototypical
probing as in "Unmute the Patch Tokens" (arXiv 2509.24901), whose prototypes are binarised to be small; here they stay
real-valued and start as training tokens. Tokens are standardised, since those of one encoder share a large common
direction that would make all cosines alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from asit.errors import AsitError
from asit.evaluate.probes import Floats, ProbeScores

Tokens = Sequence[NDArray[np.float16]]
"""N arrays (P, D)."""

_MOMENT_TOKENS = 200_000  # tokens that mean and deviation are computed on


# The training, chosen on 40 Arabic words at 5, 13 and 130 clips per class, scored on speakers held out of the training
# split: 5 prototypes per class did as well as 20, and a strong weight decay better than a weak one.
PER_CLASS, MOST = 5, 1024
"""Prototypes: K = 5 x C, up to 1,024."""
LR = 0.003
"""Of Adam, falling to 0 along a cosine over all epochs."""
WEIGHT_DECAY = 3.0
"""Of the linear layer, decoupled."""
BATCH = 64
EPOCHS, STEPS, MOST_EPOCHS = 20, 1000, 100
"""Minimum of epochs; few labels are trained for more, up to this number of steps or of epochs."""
EARLY_STOPPING = 0.2
"""Share of the epochs without a lower held-out loss after which training stops."""
HELD_OUT = 0.2
"""Share of each class's training clips that choose the epoch where there is no validation split."""


class LabelledRows(NamedTuple):
    """Rows (n,) of the tokens, and label weights (n, C) of these clips; one-hot where a clip has one label."""

    rows: NDArray[np.int64]
    targets: Floats


class PrototypeHead(nn.Module):
    """Compute logits (R, C) from tokens (R, P, D) and a mask (R, P) that is False for padding."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, start: Tensor, mean: Tensor, deviation: Tensor, classes: int) -> None:
        """Initialise prototypes with the standardised tokens `start` (K, D)."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.prototypes = nn.Parameter(F.normalize(start, dim=1))
        # Matches of unit vectors differ little: the norm scales them to a range that a linear layer can learn from.
        self.norm = nn.BatchNorm1d(len(start), affine=False)
        self.weight = nn.Parameter(torch.zeros(classes, len(start)))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        unit = F.normalize((tokens - self.mean) / self.deviation, dim=2)
        matches = unit @ F.normalize(self.prototypes, dim=1).T
        best = matches.masked_fill(~valid[..., None], -2.0).amax(1)
        logits: Tensor = F.linear(self.norm(best), self.weight, self.bias)
        return logits


def prototype_probe(
    tokens: Tokens,
    train: LabelledRows,
    test: NDArray[np.int64],
    *,
    multi: bool,
    seed: int,
    validation: LabelledRows | None = None,
    device: torch.device | None = None,
) -> ProbeScores:
    """Train the probe on some clips and score others.

    Cross-entropy for one label per clip, binary cross-entropy for several; Adam with decoupled weight decay. The epoch
    with the lowest loss on the validation split is kept; without one, on a part held out of each training class. Where
    fewer than 10 clips could be held out (few labels), all clips train and the last epoch is kept.

    Args:
        tokens: patch tokens of all clips.
        train: training clips.
        test: (m,) rows to score.
        multi: whether clips have several labels.
        seed: of the held-out part, the first prototypes and the order of the clips.
        validation: clips to choose the epoch by.
        device: where to train; None: the CPU.

    Returns:
        Probabilities (m, C); the regularisation is the number of epochs.

    Raises:
        AsitError: a loss that is not finite.
    """
    device = device or torch.device("cpu")
    rng = np.random.default_rng([seed, 2])
    how = "the validation split"
    if validation is None:
        mask = _held_out(train.targets, multi, HELD_OUT, rng)
        train, validation = (LabelledRows(train.rows[of], train.targets[of]) for of in (~mask, mask))
        how = "a part held out of the training split"
    classes = train.targets.shape[1]
    head = _initial_head(tokens, train.rows, min(MOST, PER_CLASS * classes), classes, rng).to(device)
    batches = -(-len(train.rows) // BATCH)
    epochs = max(EPOCHS, min(MOST_EPOCHS, -(-STEPS // batches)))
    optimiser = torch.optim.AdamW(
        [
            {"params": [head.prototypes, head.bias], "weight_decay": 0.0},
            {"params": [head.weight], "weight_decay": WEIGHT_DECAY},
        ],
        lr=LR,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, batches * epochs)
    best, best_epoch, kept = np.inf, epochs, None
    for epoch in range(1, epochs + 1):
        head.train()
        order = rng.permutation(len(train.rows))
        for rows in np.array_split(order, batches):
            loss = _loss(head(*_batch(tokens, train.rows[rows], device)), train.targets[rows], multi)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        if not np.isfinite(float(loss.detach())):
            raise AsitError(f"the prototype probe's loss is {float(loss)}", "a number", "look at the features")
        if not len(validation.rows):
            continue
        logits = _logits(head, tokens, validation.rows, device)
        value = float(_loss(logits, validation.targets, multi))
        if value < best:
            best, best_epoch, kept = value, epoch, copy.deepcopy(head.state_dict())
        elif epoch - best_epoch >= EARLY_STOPPING * epochs:
            break
    if kept is not None:
        head.load_state_dict(kept)
    logits = _logits(head, tokens, test, device)
    scores = (logits.sigmoid() if multi else logits.softmax(1)).cpu().numpy()
    chosen = f"loss on {how}" if len(validation.rows) else f"all {epochs} epochs: too few clips to hold some out"
    return ProbeScores(scores, float(best_epoch), chosen)


def _initial_head(
    tokens: Tokens, train: NDArray[np.int64], count: int, classes: int, rng: np.random.Generator
) -> PrototypeHead:
    """Make a head whose prototypes are random tokens, one per clip as long as there are enough clips."""
    mixed = rng.permutation(train)
    each = max(1, _MOMENT_TOKENS // max(1, len(tokens[int(mixed[0])])))
    sample = np.concatenate([tokens[int(row)] for row in mixed[:each]]).astype(np.float32)
    mean, deviation = sample.mean(0, dtype=np.float64), sample.std(0, dtype=np.float64)
    deviation[deviation < 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1.0
    owners = np.resize(mixed, count)
    picked = np.stack([tokens[int(row)][rng.integers(len(tokens[int(row)]))] for row in owners]).astype(np.float64)
    # There may be fewer clips than prototypes: a little noise separates two that start as the same token.
    start = (picked - mean) / deviation + 0.01 * rng.standard_normal(picked.shape)
    first, centre, scale = (torch.from_numpy(array.astype(np.float32)) for array in (start, mean, deviation))
    return PrototypeHead(first, centre, scale, classes)


def _held_out(targets: Floats, multi: bool, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw the mask (n,) of clips that choose the epoch: a share of each class, or of all clips where `multi`."""
    out = np.zeros(len(targets), bool)
    if multi:
        out[rng.permutation(len(targets))[: int(share * len(targets))]] = True
    else:
        truth = targets.argmax(1)
        mixed = rng.permutation(len(truth))
        ordered = mixed[np.argsort(truth[mixed], kind="stable")]
        sizes = np.bincount(truth)
        rank = np.arange(len(truth)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the class
        out[ordered[rank < np.repeat((share * sizes).astype(int), sizes)]] = True
    return out if out.sum() >= 10 else np.zeros(len(targets), bool)


def _batch(tokens: Tokens, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens of these clips (R, P, D) float32, padded with zeros, and the mask of those that are not padding."""
    found = [torch.from_numpy(tokens[row]) for row in rows.tolist()]
    batch = pad_sequence(found, batch_first=True)
    valid = torch.arange(batch.shape[1]) < torch.tensor([len(one) for one in found])[:, None]
    return batch.to(device).float(), valid.to(device)


@torch.no_grad()
def _logits(head: PrototypeHead, tokens: Tokens, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    head.eval()
    parts = [head(*_batch(tokens, rows[first : first + BATCH], device)) for first in range(0, len(rows), BATCH)]
    return torch.cat(parts) if parts else torch.empty(0, len(head.bias), device=device)


def _loss(logits: Tensor, targets: Floats, multi: bool) -> Tensor:
    wanted = torch.from_numpy(targets).to(logits.device)
    if multi:
        return F.binary_cross_entropy_with_logits(logits, wanted)
    return F.cross_entropy(logits, wanted)
