"""`python -m otl` with `Versus` beside its callbacks: on the command line OTL calls only what is installed.

python -m benchmarks.attached '{"path": "out.json", ...}' model=sd15 data.path=photos/ ...
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lightning.pytorch import Trainer

from benchmarks.versus import Versus
from otl import cli
from otl.tasks import train


def attach(versus: Versus) -> None:
    """Every Trainer that is built from here on has it as its last callback but the checkpoints, which go last."""
    build = train.build_trainer

    def build_with(*arguments: Any, **options: Any) -> Trainer:
        trainer = build(*arguments, **options)
        trainer.callbacks.append(versus)
        return trainer

    train.build_trainer = build_with


if __name__ == "__main__":
    options, sys.argv[1:] = json.loads(sys.argv[1]), sys.argv[2:]
    attach(Versus(**options))
    cli.main()
