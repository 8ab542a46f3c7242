"""What the pictures of a run show, prompt by prompt, before and after its training."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from PIL import Image

from examples.shapes.classify import Seen, classify


def shown(run: Path) -> list[dict[str, list[Seen]]]:
    """Prompt -> what is seen in its pictures: those before the first step, then those after the last."""
    calls = sorted((run / "samples").glob("step-*.json"))
    return [seen(calls[0]), seen(calls[-1])]


def seen(call: Path) -> dict[str, list[Seen]]:
    """Of one drawing: its file of calls lies beside its folder of pictures."""
    views: dict[str, list[Seen]] = {}
    for picture in json.loads(call.read_text(encoding="utf-8"))["pictures"]:
        views.setdefault(picture["prompt"], []).append(classify(Image.open(call.parent / picture["file"])))
    return views


def counted(views: list[Seen]) -> str:
    """In words, what there is most of first: "9 red star, 1 red cross"."""
    kinds = Counter(f"{view.colour} {view.shape} on {view.background}" for view in views)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    before, after = shown(parser.parse_args().run)
    for prompt in before:
        print(f"{prompt}\n  before: {counted(before[prompt])}\n  after:  {counted(after[prompt])}")


if __name__ == "__main__":
    main()
