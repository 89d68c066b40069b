"""SAELens' own end-to-end runner on a local model, timed: run as a script by an interpreter that has SAELens.

    python -P harvest_worker.py ORDER.json ANSWER.json

Imports nothing of spalf. ORDER holds what `Order` names, ANSWER gets one entry per variant. Nothing of SAELens is
replaced but a method that it calls once a step and that does nothing where no checkpoint is asked for: it reads the
clock.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

VARIANTS = ("transformers", "transformers, prefetch", "HookedTransformer")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A model directory, contexts of token ids (.npy, [n, context]), and shapes as the other side trains them."""

    model: str
    tokens: str
    layer: int
    d_model: int
    width: int
    batch: int
    context: int
    sequences: int
    """Contexts per pass of the model."""
    warmup: int
    steps: int
    device: str
    dtype: str
    """Of the language model."""
    autocast: bool
    """bfloat16 autocast of the SAE's step, as SAELens does it."""
    seed: int
    variants: tuple[str, ...] = VARIANTS


def stand_in(name: str) -> None:
    """An empty module in the place of one that SAELens imports and calls only when it logs there."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module


def causal_model(order: Order) -> Any:
    """The transformers model, frozen."""
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(order.model, dtype=getattr(torch, order.dtype))
    return model.to(order.device).eval().requires_grad_(False)


def hooked(order: Order, variant: str) -> tuple[Any, str]:
    """A model as SAELens takes it, and its hook: SAELens' own wrapper of a transformers model, or TransformerLens'.

    Both stop behind the hooked block. `load_model` of SAELens would make the first one from the same directory; it
    is handed over because that function wants a tokenizer beside the weights, which tokenised text does not need.
    """
    model = causal_model(order)
    if variant != "HookedTransformer":
        n = model.config.get_text_config().num_hidden_layers
        kind = torch.nn.ModuleList
        name = next(k for k, m in model.named_modules() if isinstance(m, kind) and len(m) == n)
        hook = f"{name}.{order.layer}"
        proxy = importlib.import_module("sae_lens.load_model").HookedProxyLM
        return proxy(model, None, hook_names=[hook]), hook
    # What `from_pretrained_no_processing` does, without its list of names: a local directory is on none.
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")
    dtype = getattr(torch, order.dtype)
    settings = loading.get_pretrained_model_config(
        order.model, hf_cfg=model.config.to_dict(), fold_ln=False, device=order.device, dtype=dtype
    )
    made = importlib.import_module("transformer_lens").HookedTransformer(settings)
    weights = loading.get_pretrained_state_dict(order.model, settings, model, dtype=dtype)
    kept = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    made.load_and_process_state_dict(weights, **dict.fromkeys(kept, False))
    made.to(order.device)
    return made.eval().requires_grad_(False), f"blocks.{order.layer}.hook_resid_post"


def config(order: Order, hook: str, variant: str) -> Any:
    """SAELens' configuration: its JumpReLU at its defaults; the buffer as small as it may be, which is the fastest."""
    library = importlib.import_module("sae_lens")
    sae = library.JumpReLUTrainingSAEConfig(
        d_in=order.d_model, d_sae=order.width, device=order.device, dtype="float32", normalize_activations="none"
    )
    return library.LanguageModelSAERunnerConfig(
        sae=sae,
        model_class_name="HookedTransformer" if variant == "HookedTransformer" else "AutoModelForCausalLM",
        model_name=order.model,
        hook_name=hook,
        dataset_path="handed over",
        is_dataset_tokenized=True,
        context_size=order.context,
        prepend_bos=False,
        training_tokens=(order.warmup + order.steps) * order.batch,
        train_batch_size_tokens=order.batch,
        store_batch_size_prompts=order.sequences,
        n_batches_in_buffer=max(20, -(-2 * order.batch // order.context)),
        device=order.device,
        seed=order.seed,
        dtype="float32",
        autocast=order.autocast,
        lr=1e-6,
        prefetch_llm_batches="prefetch" in variant,
        logger=library.LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )


class Watch:
    """Reads the clock after the warm-up and after the last step, when the device has done all of it."""

    def __init__(self, order: Order) -> None:
        self.order, self.seen, self.begin, self.seconds = order, 0, 0.0, 0.0

    def tick(self) -> None:
        self.seen += 1
        if self.seen in (self.order.warmup, self.order.warmup + self.order.steps):
            if self.order.device.startswith("cuda"):
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.begin, self.seconds = now, now - self.begin


def measure(order: Order, variant: str) -> dict[str, Any]:
    """One run of `LanguageModelSAETrainingRunner`."""
    runner = importlib.import_module("sae_lens").LanguageModelSAETrainingRunner
    trainer = importlib.import_module("sae_lens.training.sae_trainer").SAETrainer
    datasets, numpy = importlib.import_module("datasets"), importlib.import_module("numpy")
    model, hook = hooked(order, variant)
    rows = datasets.Dataset.from_dict({"tokens": numpy.load(order.tokens)})
    watch = Watch(order)
    trainer._checkpoint_if_needed = lambda trainer: watch.tick()
    runner(config(order, hook, variant), override_dataset=rows, override_model=model).run()
    count = order.steps * order.batch
    peak = torch.cuda.max_memory_allocated() if order.device.startswith("cuda") else 0
    return {"variant": variant, "hook": hook, "seconds": watch.seconds, "rows": count, "peak_bytes": peak}


def main(asked: Path, answer: Path) -> None:
    """Measure every variant; one that fails says why and the others go on."""
    os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    order = Order(**json.loads(asked.read_text(encoding="utf-8")))
    torch.set_float32_matmul_precision("high" if order.autocast else "highest")
    stand_in("wandb")
    rows: list[dict[str, Any]] = []
    for variant in order.variants:
        try:
            if order.device.startswith("cuda"):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            rows.append(measure(order, variant))
        except Exception as e:  # another library's: whatever it is, it belongs into the table
            traceback.print_exc()
            last = (str(e).strip().splitlines() or [""])[0]
            rows.append({"variant": variant, "failed": f"{type(e).__name__}: {last}"[:300]})
        answer.write_text(
            json.dumps({"version": importlib.import_module("sae_lens").__version__, "rows": rows}), encoding="utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
