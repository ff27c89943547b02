"""A user's script, for a type checker alone: `mypy --strict` finds nothing to say, so the wheel carries its types."""

from pathlib import Path

import torch

import finetune as ft

dataset = ft.open_dataset("photos")
rows: list[int] = dataset.indices("train")
recipe: ft.Recipe = ft.load_recipe("photos", ["train.strategy=partial"])
facts = ft.survey(recipe)
plan: ft.Plan = ft.make_plan(recipe, facts)
run: ft.Run = ft.train(recipe)
model: torch.nn.Module = run.model
names: tuple[str, ...] = run.classes
page: Path = run.report
for answer in ft.predict(run, ["photo.jpg"]):
    label: str | None = answer.label
again: ft.Run = ft.resume(ft.load_run("latest"))
joined: ft.Run = ft.ensemble([run, again])
network = ft.Network(torch.nn.Linear(3, 2), head="", input_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
own: ft.Run = ft.train(dataset=[], model=network)
loaded: torch.nn.Module = ft.load_run(own, model=network).model
judged = ft.evaluate(joined)
accuracy: float | None = judged.test.top1.value if judged.test else None
better: list[str] = [pair.sentence for pair in ft.compare([run, joined]).pairs]
