"""Make the embedded language model from nothing but a Python installation.

The quickstart must run without a download, and a sparse autoencoder is only worth looking at on a model that has
learned something. So the package carries a small GPT-NeoX model of Python source code, and this script made it:

    python train.py prepare --work WORK                 # corpus, tokenizer, token files   (CPU, about two minutes)
    python train.py train   --work WORK --out RUN       # the weights                      (GPU, a few minutes)
    python train.py record  --work WORK --run RUN       # figures on the final files       (CPU, about two minutes)

The steps are the modules of `making`. The package never imports this file. It needs torch, transformers and tokenizers;
the two last are imported where they are used, so that the rules in `making.corpus` can be loaded quickly by a test.
"""

from __future__ import annotations

import argparse
import logging
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from making.model import Settings
from making.record import record, sample
from making.tokens import prepare
from making.training import train

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the embedded language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    work = argparse.ArgumentParser(add_help=False)
    work.add_argument("--work", type=Path, required=True, help="folder of the token files")

    one = commands.add_parser("prepare", parents=[work], help="corpus, tokenizer, token files")
    stdlib = Path(sysconfig.get_path("stdlib"))
    one.add_argument("--stdlib", type=Path, default=stdlib, help="default: that of this interpreter")
    one.add_argument("--out", type=Path, default=HERE, help="where the tokenizer goes (default: beside this script)")

    two = commands.add_parser("train", parents=[work], help="the weights")
    two.add_argument("--out", type=Path, required=True, help="where the weights and run.json go")
    two.add_argument("--layers", type=int, default=4)
    two.add_argument("--width", type=int, default=192)
    two.add_argument("--dropout", type=float, default=0.1)
    two.add_argument("--lr", type=float, default=3e-3)
    two.add_argument("--weight-decay", type=float, default=0.1)
    two.add_argument("--batch", type=int, default=128, help="contexts a step")
    two.add_argument("--epochs", type=float, default=30.0)
    two.add_argument("--warmup", type=int, default=200)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--library-weight", type=int, default=2, help="copies of a file outside the test suites an epoch")
    two.add_argument("--compile", action="store_true", help="torch.compile the objective")
    two.add_argument("--max-seconds", type=float, default=math.inf, help="shorten the run to this time")

    three = commands.add_parser("record", parents=[work], help="figures on the final files")
    three.add_argument("--run", type=Path, required=True, help="what train wrote")
    three.add_argument("--out", type=Path, default=HERE, help="where the tokenizer is and the weights go")

    four = commands.add_parser("sample", help="look at what the model writes")
    four.add_argument("--model", type=Path, default=HERE)
    four.add_argument("prompts", nargs="*", default=["import os\n\ndef ", "class ", "for i in "])

    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    command = options.pop("command")
    if command == "prepare":
        prepare(options["stdlib"], options["work"], options["out"])
    elif command == "train":
        folder, out = options.pop("work"), options.pop("out")
        train(folder, out, Settings(**options))
    elif command == "record":
        record(options["work"], options["run"], options["out"])
    else:
        sample(options["model"], options["prompts"])


if __name__ == "__main__":
    main()
