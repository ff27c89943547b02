"""AutoTimm: the quick start of its page, which searches the rate and the batch by itself.

https://pypi.org/project/autotimm/ ("Your First Model"): `ImageDataModule`, `ImageClassifier(lr=1e-3)`,
`AutoTrainer(max_epochs=10)` with rate and batch size found. Its `TransformConfig` carries the backbone's mean,
deviation, interpolation and crop. 10 % for validation, its default; the checkpoint with the lowest val loss, which
it keeps by itself; its checkpoints hold the `TransformConfig`, and Lightning 2.6 loads them when told to trust them.
Local weights: `BackboneConfig(extra_kwargs={"pretrained_cfg_overlay": {"file": ...}})`, which go
to `timm.create_model`.
"""

from door import Task, read_task


def fine_tune(task: Task) -> None:
    # user code
    import torch
    from autotimm import AutoTrainer, BackboneConfig, ImageClassifier, ImageDataModule, MetricConfig, TransformConfig
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    config = task.config
    pixels = config["pretrained_cfg"]
    backbone = BackboneConfig(
        config["architecture"],
        extra_kwargs={
            **config["model_args"],
            "pretrained_cfg_overlay": {"file": str(task.weights / "model.safetensors")},
        },
    )
    view = TransformConfig(
        image_size=task.pixels,
        mean=tuple(pixels["mean"]),
        std=tuple(pixels["std"]),
        interpolation=pixels["interpolation"],
        crop_pct=pixels["crop_pct"],
    )
    images = ImageDataModule(
        str(task.cell), image_size=task.pixels, transform_config=view, backbone=config["architecture"], batch_size=64
    )
    accuracy = MetricConfig(
        name="accuracy",
        backend="torchmetrics",
        metric_class="Accuracy",
        params={"task": "multiclass"},
        stages=["train", "val"],
        prog_bar=True,
    )
    model = ImageClassifier(
        backbone,
        num_classes=len(task.classes),
        metrics=[accuracy],
        lr=1e-3,
        seed=task.seed,
        **task.option("learning_rate"),
    )
    trainer = AutoTrainer(max_epochs=task.epochs or 10, seed=task.seed, default_root_dir=str(task.out))
    trainer.fit(model, datamodule=images, **({"ckpt_path": "last"} if task.resume else {}))
    # end of user code
    task.mark_fitted()
    # user code
    test = ImageFolder(str(task.cell / "test"), images.eval_transforms)
    probabilities = torch.cat(trainer.predict(model, DataLoader(test, 64), ckpt_path="best", weights_only=False))
    # end of user code
    names = [task.name_of(path) for path, _ in test.samples]
    task.write(names, probabilities, test.classes, ("autotimm", "pytorch-lightning", "timm", "torch"))


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    fine_tune(task)
