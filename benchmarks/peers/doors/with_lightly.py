"""lightly-train: `train_image_classification` on a timm backbone.

https://docs.lightly.ai/train/stable/image_classification.html: data as folders, AdamW at 3e-4 for batches of 16,
warmed up over 500 steps; the best checkpoint on val. Its 100,000 steps by default are 1.6 million images: hours on a
GPU, a day and more on one core, so `steps` is 1,000 here, and the table says so. Local weights:
`model_args={"backbone_weights": FILE}`.
"""

from door import Task, divide, read_task


def fine_tune(task: Task) -> None:
    folder = divide(task, task.out / "data", "val")
    # user code
    import lightly_train

    config = task.config
    cfg = config["pretrained_cfg"]
    lightly_train.train_image_classification(
        out=task.out / "run",
        model=f"timm/{config['architecture']}",
        data={
            "train": str(folder / "train"),
            "val": str(folder / "val"),
            "classes": dict(enumerate(task.classes)),
        },
        steps=task.epochs * task.num_train // 16 + 1 if task.epochs else 1000,
        seed=task.seed,
        accelerator="cpu",
        overwrite=not task.resume,
        resume_interrupted=task.resume,
        model_args={
            "backbone_weights": str(task.weights / "backbone.pth"),
            "backbone_args": config["model_args"],
            **task.option("learning_rate"),
        },
        transform_args={
            "image_size": (task.pixels, task.pixels),
            "normalize": {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"])},
        },
    )
    # end of user code
    task.mark_fitted()
    # user code
    model = lightly_train.load_model(task.out / "run" / "exported_models" / "exported_best.pt", device="cpu")
    rows = []
    for path in task.test_files:
        told = model.predict(path, topk=len(task.classes))
        share = dict(zip(told["labels"].tolist(), told["scores"].tolist(), strict=True))
        rows.append([share[label] for label in range(len(task.classes))])
    # end of user code
    names = [task.name_of(path) for path in task.test_files]
    task.write(names, rows, task.classes, ("lightly-train", "timm", "torch"))


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    fine_tune(task)
