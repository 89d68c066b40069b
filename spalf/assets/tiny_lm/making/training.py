"""The training run: batches, rate, and the weights of the best validation loss."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import versions, write_json
from .model import Settings, losses, make_model, mean_loss
from .tokens import CONTEXT, Tokens, pack, read_tokens

logger = logging.getLogger("tiny_lm")


def batches(documents: Sequence[Tokens], batch: int, device: torch.device, seed: int) -> Iterator[Tensor]:
    """Endless batches of contexts: each epoch joins the documents in a new order, cuts elsewhere, shuffles the cuts."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(documents))
        contexts = pack([documents[i] for i in order], start=int(rng.integers(CONTEXT)))
        rng.shuffle(contexts)
        ids = torch.from_numpy(contexts.astype(np.int32)).to(device)
        for first in range(0, len(ids) - batch + 1, batch):
            yield ids[first : first + batch].long()


def rate_at(step: int, progress: float, settings: Settings) -> float:
    """The learning rate: a cosine to zero over the run, `progress` from 0 to 1, under a linear warm-up in steps."""
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(model: Any, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    """AdamW that leaves vectors without weight decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def make_objective(model: Any, settings: Settings, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The loss of a batch, in bf16 autocast."""

    def objective(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return losses(logits, ids).mean()

    return torch.compile(objective) if settings.compile else objective


def train(work: Path, out: Path, settings: Settings) -> None:
    """Train, keep the weights of the best validation loss, and write them in bf16 with `run.json`, the run's log.

    A run ends after `epochs` or `max_seconds`, whichever comes first, and the schedule follows whichever is nearer to
    its end. The log tells how many epochs it was: `--epochs` of that number repeats the run elsewhere.
    """
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = read_tokens(work, "train", settings.library_weight)
    validation = torch.from_numpy(pack(read_tokens(work, "validation")).astype(np.int64)).to(device)
    per_epoch = (sum(map(len, documents)) + len(documents)) // CONTEXT // settings.batch
    total = max(1, round(settings.epochs * per_epoch))

    model = make_model(settings).to(device)
    optimizer = make_optimizer(model, settings, device)
    objective = make_objective(model, settings, device)
    history: list[dict[str, float]] = []
    best: tuple[float, int, dict[str, Tensor]] = (math.inf, 0, {})
    since: list[Tensor] = []
    stream = batches(documents, settings.batch, device, settings.seed)
    began = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, progress, settings)
        loss = objective(next(stream))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        since.append(loss.detach())
        step += 1
        if step == 1:
            began = time.monotonic()  # compilation is not the run's time
        if step % 50 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # the clock below must not run behind the queue
        progress = max(step / total, (time.monotonic() - began) / settings.max_seconds)
        if progress >= min(1.0, (len(history) + 1) / 20):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                score = mean_loss(model, validation)
            mean = torch.stack(since).mean().item()
            history.append({"step": step, "train": round(mean, 4), "validation": round(score, 4)})
            since.clear()
            logger.info("%s, %.0f s", history[-1], time.monotonic() - began)
            if score < best[0]:
                best = (score, step, {name: value.detach().cpu().clone() for name, value in model.state_dict().items()})

    model.load_state_dict(best[2])
    model.config.hidden_dropout = model.config.attention_dropout = 0.0  # was for training; see run.json
    model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(out)
    took = time.monotonic() - began
    write_json(out / "run.json", described(settings, model, device, step, step / per_epoch, best[1], took, history))


def described(
    settings: Settings,
    model: Any,
    device: torch.device,
    steps: int,
    epochs: float,
    best_step: int,
    seconds: float,
    history: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """The log of a run."""
    import transformers

    return {
        "settings": {
            **vars(settings),
            "max_seconds": settings.max_seconds if math.isfinite(settings.max_seconds) else None,
            "optimizer": "AdamW, betas (0.9, 0.95), no weight decay on vectors, gradient norm clipped at 1",
            "schedule": f"a cosine to zero under a linear warm-up of {settings.warmup} steps",
            "library_weight_means": "files outside the test suites come that many times in an epoch",
            "precision": "fp32 weights, bf16 autocast; saved in bf16",
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens_seen": steps * settings.batch * CONTEXT,
        "epochs": round(epochs, 3),
        "best_step": best_step,
        "seconds": round(seconds, 1),
        "machine": f"one {torch.cuda.get_device_name()}" if device.type == "cuda" else "a CPU",
        "versions": versions(transformers),
        "history": history,
    }
